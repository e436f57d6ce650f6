"""`syncline dpo FILE`: trains an adapter on preference pairs by TRL's DPO; goes on at its last checkpoint."""

import argparse
from pathlib import Path

from syncline.config.offline import OfflineConfig, load_offline
from syncline.errors import ConfigError
from syncline.offline.stage import Finished

STAGE = "dpo"
ADAPTER = "adapter"
LOCAL_ONLY = {"num_rounds", "checkpoint_interval", "devices"}
"""Fields of `dpo` that a round's result does not depend on."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", help="the pipeline's YAML file")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c")
    parser.add_argument("--pairs", type=Path, help="default: those of the run's last finished stage `pairs`")
    parser.add_argument("--heldout", type=Path, help="pairs to measure and not to train on")
    parser.add_argument("--start", type=Path, help="an adapter to go on with; default: a fresh one")
    parser.add_argument("--policy", help="the digest of the weights that must have sampled the pairs; default: any")


def run(args: argparse.Namespace) -> int:
    from syncline.cli.merge import model_folder
    from syncline.launch.plan import see_only
    from syncline.observe.logs import set_up_logging
    from syncline.offline.pairs import HELDOUT_FILE, PAIRS_FILE
    from syncline.offline.stage import latest

    set_up_logging()
    config = load_offline(args.file, args.overrides)
    pairs, heldout = given = args.pairs, args.heldout
    if missing := [f"--pairs, --heldout: {path} is no file" for path in given if path and not path.is_file()]:
        raise ConfigError(missing)
    see_only("dpo.devices", config.dpo.devices, device=config.dpo.device)
    if pairs is None:
        folder = latest(Path(config.run.dir), "pairs").folder
        pairs, heldout = folder / PAIRS_FILE, heldout or folder / HELDOUT_FILE
    done = dpo_stage(config, model_folder(config), pairs, heldout=heldout, start=args.start, policy=args.policy)
    for name, value in done.facts.items():
        print(f"{name:24} {value}")
    print(done.folder / ADAPTER)
    return 0


def dpo_stage(
    config: OfflineConfig,
    model_path: Path,
    pairs: Path,
    *,
    heldout: Path | None,
    start: Path | None = None,
    policy: str | None = None,
) -> Finished:
    """One round, finished. An empty file of held-out pairs is none."""
    from syncline.offline.dpo import Task, train_dpo
    from syncline.offline.stage import Stage, file_digest, run_stage, tokenizer_digest, weights_digest

    heldout = heldout if heldout and heldout.is_file() and heldout.stat().st_size else None
    inputs = {"base": weights_digest(model_path), "pairs": file_digest(pairs)}
    inputs |= {"tokenizer": tokenizer_digest(config.model.tokenizer or str(model_path))}
    inputs |= {"heldout": file_digest(heldout)} if heldout else {}
    inputs |= {"start": weights_digest(start)} if start else {}
    inputs |= {"policy": policy} if policy else {}
    model = config.model.model_copy(update={"path": str(model_path)})
    known = {
        "dpo": config.dpo.model_dump(mode="json", exclude=LOCAL_ONLY),
        "model": config.model.model_dump(mode="json", exclude={"path"}),
        "seed": config.run.seed,
    }
    task = Task(model, pairs, heldout=heldout, start=start, policy=policy, seed=config.run.seed)
    run_dir = Path(config.run.dir)
    return run_stage(
        run_dir, Stage(STAGE, known, inputs), lambda notes: train_dpo(config.dpo, task, notes), outputs=(ADAPTER,)
    )
