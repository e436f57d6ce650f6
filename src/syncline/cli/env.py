"""`syncline env FILE`: one environment's worker: takes tasks, samples groups, scores, posts.

`syncline env new NAME` writes the files of a new environment instead.
"""

import argparse
import asyncio
import os
from pathlib import Path

from syncline.config import RunConfig, load
from syncline.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", help="the run's YAML file; or `new`, then a NAME: write a new environment and its test")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c")
    parser.add_argument("--index", type=int, default=0, help="which of the file's environments, from 0")
    parser.add_argument("--engine-url", dest="engine_urls", metavar="URL", action="append")
    parser.add_argument("--trajectories-url")
    parser.add_argument("--patience-seconds", type=float, default=60.0, help="for a trajectory server that is away")
    parser.add_argument("--into", type=Path, default=Path(), help="with `new`: the folder of the files")


def run(args: argparse.Namespace) -> int:
    from syncline.observe.logs import set_up_logging

    if args.file == "new":
        return _new(args.overrides, args.into)
    if not args.engine_urls or not args.trajectories_url:
        raise ConfigError(["--engine-url, --trajectories-url: missing; say where engine and trajectory server listen"])
    set_up_logging()
    config = load(args.file, args.overrides)
    check_index(config, args)
    asyncio.run(_work(config, args))
    return 0


def check_index(config: RunConfig, args: argparse.Namespace) -> None:
    """Raises `ConfigError` for an environment that the file does not have."""
    if not 0 <= args.index < len(config.environments):
        raise ConfigError([f"--index: {args.index}, but {args.file} has {len(config.environments)} environments"])


def _new(names: list[str], folder: Path) -> int:
    from syncline.envs.scaffold import class_name, write_environment

    if len(names) != 1:
        raise ConfigError([f"syncline env new: takes one NAME, got {names}"])
    code, test = write_environment(names[0], folder)
    title = class_name(names[0])
    print(f"{code}\n{test}")
    print(f"try it: cd {folder} && python -m pytest {test.name}")
    print(f"train on it, with {folder.resolve()} on PYTHONPATH: environments: [{{task: '{names[0]}:{title}'}}]")
    return 0


async def _work(config: RunConfig, args: argparse.Namespace) -> None:
    from syncline.cli.sampling import open_policy, training_environment
    from syncline.envs.worker import EnvironmentWorker
    from syncline.trajectory.client import TrajectorySink
    from syncline.trajectory.guard import TOKEN_VARIABLE

    own = config.environments[args.index]
    environment = training_environment(config, args.index)
    token, patience = os.environ.get(TOKEN_VARIABLE), args.patience_seconds
    num_tasks = getattr(environment, "num_train_tasks", None)
    async with (
        open_policy(config, args.engine_urls, temperature=config.sampling.temperature) as policy,
        TrajectorySink(args.trajectories_url, num_tasks=num_tasks, token=token, retry_seconds=patience) as sink,
    ):
        worker = EnvironmentWorker(
            environment,
            policy,
            sink=sink,
            name=own.name or own.task,
            rollouts_per_group=config.run.rollouts_per_group,
            concurrency=own.concurrency,
            group_timeout_seconds=config.engine.request_timeout_seconds,
        )
        await worker.run_until_signal()
