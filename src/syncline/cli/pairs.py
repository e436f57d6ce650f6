"""`syncline pairs FILE`: preferences from collected rollouts, and a report of what was left out."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from syncline.config.offline import OfflineConfig, load_offline
from syncline.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", help="the pipeline's YAML file")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c")
    parser.add_argument("--rollouts", type=Path, help="absent: those of the one complete collection in run.dir")


def run(args: argparse.Namespace) -> int:
    from syncline.offline.pairs import PAIRS_FILE

    config = load_offline(args.file, args.overrides)
    done = pairs_stage(config, args.rollouts or _collected(Path(config.run.dir)))
    print(json.dumps(done.facts, indent=2))
    length = done.facts["length"]["all"]
    if not length["balanced"]:
        print(f"warning: the chosen answer is the longer one in {length['chosen_longer']:.0%} of the pairs")
    print(done.folder / PAIRS_FILE)
    return 0


def pairs_stage(config: OfflineConfig, rollouts: Path, *, model: str | None = None) -> Any:
    """The finished stage. `model`: the digest that the rollouts must be of. Raises `ConfigError` for zero pairs."""
    from syncline.observe.files import write_atomically
    from syncline.offline.pairs import HELDOUT_FILE, PAIRS_FILE, REPORT_FILE, make_pairs, record, report
    from syncline.offline.records import Trajectory, read_trajectories
    from syncline.offline.stage import Notes, Stage, file_digest, run_stage

    if not rollouts.is_file():
        raise ConfigError([f"--rollouts: {rollouts} is no file; give the rollouts.jsonl of a collection"])
    asked = config.pairs
    inputs = {"rollouts": file_digest(rollouts)} | ({"model": model} if model else {})

    def work(notes: Notes) -> None:
        found = make_pairs(read_trajectories(rollouts, Trajectory), asked, model=model)
        for name, pairs in ((PAIRS_FILE, found.train), (HELDOUT_FILE, found.heldout)):
            text = "".join(json.dumps(record(pair, strategy=asked.strategy)) + "\n" for pair in pairs)
            write_atomically(notes.folder / name, text)
        notes.facts |= report(found)
        write_atomically(notes.folder / REPORT_FILE, json.dumps(notes.facts, indent=2) + "\n")

    outputs = (PAIRS_FILE, HELDOUT_FILE, REPORT_FILE)
    return run_stage(Path(config.run.dir), Stage("pairs", asked.model_dump(mode="json"), inputs), work, outputs=outputs)


def _collected(run_dir: Path) -> Path:
    from syncline.cli.collect import STAGE
    from syncline.offline.collect import ROLLOUTS_FILE

    found: Sequence[Path] = sorted(run_dir.glob(f"{STAGE}-*/{ROLLOUTS_FILE}"))
    if len(found) != 1:
        told = f"holds {len(found)} complete collections" if found else "holds no complete collection"
        raise ConfigError([f"--rollouts: {run_dir} {told}; name one's {ROLLOUTS_FILE}"])
    return found[0]
