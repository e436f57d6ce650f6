"""`syncline evaluate FILE`: accuracy on held-out tasks: of a run's environments, or of a pipeline file's sets.

What was evaluated is named by digest, asked before and after: weights that move under an evaluation are an error.
"""

import argparse
import asyncio
import json
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from syncline.cli.held import held_by
from syncline.config import RunConfig, load
from syncline.errors import ConfigError, SyncError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", help="a run's YAML file (evaluation.num_tasks says how many tasks), or a pipeline's")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c")
    parser.add_argument("--engine-url", dest="engine_urls", metavar="URL", action="append", default=[])
    parser.add_argument("--out", type=Path, help="of a run: where the JSON goes; a folder: one file a digest")
    parser.add_argument("--adapter", type=Path, help="of a pipeline: a PEFT folder to evaluate over the model")
    parser.add_argument("--baseline", type=Path, help="of a pipeline: the folder of an evaluation to compare with")


def run(args: argparse.Namespace) -> int:
    from syncline.config.load import read_values

    if "eval" in read_values(args.file):
        from syncline.cli.assess import run_sets

        return run_sets(args)
    if others := [f"--{name}" for name in ("adapter", "baseline") if getattr(args, name) is not None]:
        raise ConfigError([f"{name}: is of a pipeline's file alone, and {args.file} is a run's" for name in others])
    missing = [f"--{name}" for name, value in (("engine-url", args.engine_urls), ("out", args.out)) if not value]
    if missing:
        raise ConfigError([f"{name}: missing; the evaluation of a run's environments needs it" for name in missing])
    return run_environments(args)


def run_environments(args: argparse.Namespace) -> int:
    from syncline.observe.files import write_atomically
    from syncline.observe.logs import set_up_logging

    set_up_logging()
    config = load(args.file, args.overrides)
    if config.evaluation.num_tasks == 0:
        raise ConfigError(["evaluation.num_tasks: 0 evaluates nothing; set it to the tasks of each environment"])
    receipt, engine_urls = held_by(config, args.engine_urls)
    model = {"path": config.model.path, **asdict(receipt)}
    result = {"model": model, **asyncio.run(_evaluate(config, engine_urls=engine_urls))}
    if (after := held_by(config, engine_urls)[0]) != receipt:
        raise SyncError(f"the weights moved under the evaluation, from {receipt} to {after}; evaluate again")
    out = args.out / f"{receipt.digest.replace(':', '-')}.json" if args.out.is_dir() else args.out
    write_atomically(out, json.dumps(result, indent=2) + "\n")
    for one in result["environments"]:
        print("\n".join(_told(one)))
    return 0


def _told(one: dict[str, Any]) -> list[str]:
    interval = " [{:.3f}, {:.3f}]".format(*one["interval"]) if one["interval"] else ""
    rows = [("accuracy", one["accuracy"], interval)]
    for name, found in (("pass", one["pass_at"]), ("maj", one["majority_at"])):
        rows += [(f"{name}@{k}", at["rate"], " [{:.3f}, {:.3f}]".format(*at["interval"])) for k, at in found.items()]
    shown = rows if one["num_samples"] > 1 else rows[:1]
    where = f"held-out {one['environment']}"
    return [f"{where}: {name} {rate:.3f}{interval} on {one['num_tasks']} tasks" for name, rate, interval in shown]


async def _evaluate(config: RunConfig, *, engine_urls: list[str]) -> dict[str, Any]:
    from syncline.cli.sampling import open_policy
    from syncline.envs.evaluate import evaluate
    from syncline.envs.registry import build_environment

    asked = config.evaluation
    async with open_policy(config, engine_urls, temperature=asked.temperature, unpublished_version=0) as policy:
        found = [
            await evaluate(
                build_environment(own, position=i, seed=config.run.seed),
                policy,
                num_tasks=asked.num_tasks,
                num_samples=asked.num_samples,
                name=own.name or own.task,
                timeout_seconds=config.engine.request_timeout_seconds,
                concurrency=own.concurrency,
            )
            for i, own in enumerate(config.environments)
        ]
    return {"accuracy": fmean(e.accuracy for e in found), "environments": [asdict(e) for e in found]}
