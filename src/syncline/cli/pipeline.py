"""`syncline pipeline FILE`: merge → evaluate → (collect → pairs → DPO → evaluate) × rounds → report, in one command.

Whatever kills it, the same command goes on: finished stages are skipped, the interrupted one continues at its next item
(engines start only if something is left to sample). Between rounds they are moved on by a bridge, never restarted.
"""

import argparse
import json
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from syncline.cli import collect
from syncline.cli.report import PIPELINE_FILE
from syncline.config.offline import OfflineConfig, load_offline
from syncline.offline.stage import Finished

if TYPE_CHECKING:
    from syncline.launch.plan import Machine


def add_arguments(parser: argparse.ArgumentParser) -> None:
    collect.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    from syncline.cli.assess import told, told_comparison
    from syncline.launch.plan import Machine, see_only
    from syncline.observe.logs import set_up_logging
    from syncline.offline.report import write_offline_report

    set_up_logging()
    config = load_offline(args.file, args.overrides)
    machine = Machine.here()
    see_only("dpo.devices", config.dpo.devices, device=config.dpo.device)
    summary = run_pipeline(config, machine, given=tuple(args.engine_urls), show=partial(print, flush=True))
    for own in (summary["evaluations"][0], summary["evaluations"][-1]):
        print(f"round {own['round']}, model {own['model'][:12]}")
        print("\n".join(f"  {line}" for line in told(own["sets"])))
    for name, found in summary["comparisons"].items():
        print(told_comparison(name, found))
    print(write_offline_report(Path(config.run.dir), num_examples=config.report.num_examples))
    return 0


def run_pipeline(
    config: OfflineConfig, machine: "Machine", *, given: tuple[str, ...], show: Callable[[str], None]
) -> dict[str, Any]:
    """Every stage, done, and `summary.json`, which it returns. `machine` is what engines are started on: this process
    sees the GPU of `dpo.devices` alone."""
    from syncline.cli.assess import assess_stage
    from syncline.cli.merge import model_folder
    from syncline.cli.policies import Policies
    from syncline.observe.files import write_atomically
    from syncline.observe.summary import SUMMARY_FILE
    from syncline.offline.engines import running_engines

    run_dir = Path(config.run.dir)
    write_atomically(run_dir / PIPELINE_FILE, _text(config))
    path = model_folder(config)
    adapter = Path(config.collect.adapter) if config.collect.adapter else None
    told = _Told(show)
    with Policies(config, path, given=given, start=partial(running_engines, machine=machine)) as policies:
        evaluations = [told.stage("evaluate", lambda: assess_stage(config, policies, adapter, version=0))]
        rounds: list[dict[str, Finished]] = []
        for number in range(1, config.dpo.num_rounds + 1):
            show(f"round {number} of {config.dpo.num_rounds}")
            rounds.append(_round(config, path, policies, adapter, machine=machine, number=number, told=told))
            adapter = rounds[-1]["dpo"].folder / "adapter"
            after = adapter
            evaluations.append(
                told.stage("evaluate", lambda: assess_stage(config, policies, after, version=number))  # noqa: B023
            )
    summary = _summary(config, path, rounds, evaluations)
    write_atomically(run_dir / SUMMARY_FILE, json.dumps(summary, indent=2) + "\n")
    return summary


def _round(
    config: OfflineConfig,
    path: Path,
    policies: Any,
    adapter: Path | None,
    *,
    machine: "Machine",
    number: int,
    told: "_Told",
) -> dict[str, Finished]:
    """Each round has a seed of its own, and so other samples, and other questions where they are made."""
    from syncline.cli.collect import collect_stage
    from syncline.cli.dpo import dpo_stage
    from syncline.cli.pairs import pairs_stage
    from syncline.offline.collect import ROLLOUTS_FILE
    from syncline.offline.pairs import HELDOUT_FILE, PAIRS_FILE

    version = number - 1
    run = config.run.model_copy(update={"seed": config.run.seed + version})
    own = config.model_copy(update={"run": run, "collect": config.collect.model_copy(update={"adapter": None})})
    digest = policies.digest(adapter, version=version)
    rollouts = told.stage(
        "collect",
        lambda: collect_stage(
            own, lambda: policies.serve(adapter, version=version)[0], gpus=machine.gpus, model=digest
        ),
    )
    pairs = told.stage("pairs", lambda: pairs_stage(own, rollouts.folder / ROLLOUTS_FILE, model=digest))
    trained = told.stage(
        "dpo",
        lambda: dpo_stage(
            own,
            path,
            pairs.folder / PAIRS_FILE,
            heldout=pairs.folder / HELDOUT_FILE,
            start=adapter,
            policy=digest,
        ),
    )
    return {"collect": rollouts, "pairs": pairs, "dpo": trained}


class _Told:
    """Says which stage is begun, and whether it was there already."""

    def __init__(self, show: Callable[[str], None]) -> None:
        self._show = show

    def stage(self, name: str, work: Callable[[], Finished]) -> Finished:
        self._show(f"{name} …")
        started = time.monotonic()
        before = time.time()
        done = work()
        fresh = done.manifest["attempts"][-1]["started"] >= before
        how = f"in {time.monotonic() - started:.1f} s" if fresh else "was finished"
        self._show(f"{name} {how}: {done.folder}")
        return done


def _summary(
    config: OfflineConfig, path: Path, rounds: list[dict[str, Finished]], evaluations: list[Finished]
) -> dict[str, Any]:
    """Folders by name, so that the run's folder may be moved."""
    from syncline.cli.assess import comparisons

    baseline = Path(config.eval.baseline) if config.eval.baseline else evaluations[0].folder
    return {
        "model_path": str(path),
        "rounds": [{name: done.folder.name for name, done in one.items()} for one in rounds],
        "evaluations": [
            {"round": number, "folder": done.folder.name, "model": done.facts["model"], "sets": done.facts["sets"]}
            for number, done in enumerate(evaluations)
        ],
        "comparisons": comparisons(config, baseline, evaluations[-1].folder),
        "seconds": sum(done.manifest["seconds"] for done in _all(rounds, evaluations)),
    }


def _all(rounds: list[dict[str, Finished]], evaluations: list[Finished]) -> list[Finished]:
    return [*evaluations, *(done for one in rounds for done in one.values())]


def _text(config: OfflineConfig) -> str:
    import yaml

    values: Mapping[str, Any] = config.model_dump(mode="json")
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=120)
