"""The evaluation of a pipeline's sets, which `evaluate` and `pipeline` share. What it says is bound to a digest."""

import argparse
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from syncline.config.offline import OfflineConfig, load_offline
from syncline.errors import ConfigError
from syncline.offline.stage import Finished

STAGE = "evaluate"
LOCAL_ONLY = {"concurrency": True, "lost_after_seconds": True, "baseline": True}
"""Fields of `eval` that no result depends on; rows are known by their own digest, not by where they lie."""


def run_sets(args: argparse.Namespace) -> int:
    from syncline.cli.merge import model_folder
    from syncline.cli.policies import Policies
    from syncline.launch.plan import Machine, see_only
    from syncline.observe.logs import set_up_logging
    from syncline.offline.engines import running_engines

    set_up_logging()
    config = load_offline(args.file, args.overrides)
    start = partial(running_engines, machine=Machine.here())
    see_only("dpo.devices", config.dpo.devices, device=config.dpo.device)  # where an adapter is published from
    path = model_folder(config)
    with Policies(config, path, given=tuple(args.engine_urls), start=start) as policies:
        done = assess_stage(config, policies, args.adapter, version=1)
    print("\n".join(told(done.facts["sets"])))
    baseline = args.baseline or (Path(config.eval.baseline) if config.eval.baseline else None)
    if baseline:
        for name, found in comparisons(config, baseline, done.folder).items():
            print(told_comparison(name, found))
    print(done.folder / "evaluation.json")
    return 0


def assess_stage(config: OfflineConfig, policies: Any, adapter: Path | None, *, version: int) -> Finished:
    """The finished evaluation of the model with the adapter; engines are asked only for answers that are not there."""
    from syncline.offline.assess import EVALUATION_FILE, answers_file, assess
    from syncline.offline.collect import Place
    from syncline.offline.stage import Notes, Stage, file_digest, finished, run_stage, tokenizer_digest

    digest = policies.digest(adapter, version=version)
    known = config.eval.model_dump(mode="json", exclude={**LOCAL_ONLY, "sets": {"__all__": {"path"}}})
    paths = {own.name: Path(own.path) for own in config.eval.sets if own.path}
    rows = {f"rows {name}": file_digest(path) for name, path in paths.items() if path.is_file()}
    asked = {"eval": known, "seed": config.run.seed, "max_length": config.model.max_length}
    tokenizer = config.model.tokenizer or config.model.path
    stage = Stage(STAGE, asked, {"model": digest, "tokenizer": tokenizer_digest(tokenizer), **rows})
    if done := finished(Path(config.run.dir), stage):
        return done
    urls, held = policies.serve(adapter, version=version)

    def work(notes: Notes) -> None:
        place = Place(
            folder=notes.folder,
            engine_urls=urls,
            tokenizer=tokenizer,
            max_length=config.model.max_length,
            timeout_seconds=config.engine.request_timeout_seconds,
            slots=config.engine.max_num_seqs,
        )
        notes.facts |= assess(config.eval, place, model=held, seed=config.run.seed, show=print)
        notes.tokens = notes.facts["tokens"]

    outputs = (EVALUATION_FILE, *(answers_file(own) for own in config.eval.sets))
    return run_stage(Path(config.run.dir), stage, work, outputs=outputs)


def comparisons(config: OfflineConfig, before: Path, after: Path) -> dict[str, Any]:
    """By set. Raises `ConfigError` for a folder that holds no evaluation of these sets, or of other questions alone."""
    from syncline.offline.assess import read_marks
    from syncline.offline.marks import GREEDY, compare

    read = {
        folder: [read_marks(config.eval, folder, own, seed=config.run.seed) for own in config.eval.sets]
        for folder in (before, after)
    }
    for own, *both in zip(config.eval.sets, read[before], read[after], strict=True):
        asked, again = ({one.question_id for one in marks if one.arm == GREEDY} for marks in both)
        if asked.isdisjoint(again):
            where = f"{before} and {after} have no question of the set {own.name!r} in common"
            raise ConfigError([f"eval.baseline: {where}; give the folder of an evaluation of the same set"])
    return {own.name: compare(a, b) for own, a, b in zip(config.eval.sets, read[before], read[after], strict=True)}


def told(sets: Mapping[str, Any]) -> list[str]:
    lines = []
    for name, found in sets.items():
        low, high = found["greedy"]["interval"]
        lines.append(
            f"{name}: greedy {found['greedy']['accuracy']:.4f} [{low:.4f}, {high:.4f}] on {found['num_questions']}, "
            f"format {found['greedy']['format_rate']:.3f}, truncated {found['greedy']['truncated_rate']:.3f}"
        )
        for label, field in (("pass", "pass_at"), ("maj", "majority_at")):
            for k, at in found[field].items():
                lines.append(f"{name}: {label}@{k} {at['rate']:.4f} [{at['interval'][0]:.4f}, {at['interval'][1]:.4f}]")
    return lines


def told_comparison(name: str, found: Mapping[str, Any]) -> str:
    greedy = (
        f"{name}: greedy {found['accuracy_before']:.4f} -> {found['accuracy_after']:.4f} on {found['num_questions']} "
        f"questions, {found['fixed']} fixed, {found['broken']} broken, McNemar p = {found['p']:.3g}"
    )
    if (sampled := found["sampled"]) is None:
        return greedy
    return greedy + (
        f"\n{name}: sampled {sampled['before']:.4f} -> {sampled['after']:.4f}, {sampled['better']} questions better, "
        f"{sampled['worse']} worse, sign test p = {sampled['p']:.3g}"
    )
