"""`syncline process FILE`: samples and scores groups of one environment against a running engine, without a trainer.

Writes whole groups, tokens and all, as JSON lines, each as soon as it is done, and at the end a page for people.
"""

import argparse
import asyncio
from pathlib import Path
from typing import Any

from syncline.cli.env import check_index
from syncline.config import RunConfig, load
from syncline.errors import ConfigError

GROUPS_FILE = "groups.jsonl"
PAGE_FILE = "groups.html"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", help="the run's YAML file")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c")
    parser.add_argument("--index", type=int, default=0, help="which of the file's environments, from 0")
    parser.add_argument("--engine-url", dest="engine_urls", metavar="URL", action="append", required=True)
    parser.add_argument("--num-groups", type=int, default=8)
    parser.add_argument("--split", choices=("train", "heldout"), default="train")
    parser.add_argument(
        "--out", type=Path, required=True, help=f"a folder, for {GROUPS_FILE} and {PAGE_FILE}; or a .jsonl file"
    )


def run(args: argparse.Namespace) -> int:
    from syncline.cli.view import write_page
    from syncline.observe.logs import set_up_logging

    set_up_logging()
    config = load(args.file, args.overrides)
    check_index(config, args)
    if args.num_groups < 1:
        raise ConfigError([f"--num-groups: {args.num_groups} samples nothing; give 1 or more"])
    groups = args.out if args.out.suffix == ".jsonl" else args.out / GROUPS_FILE
    groups.parent.mkdir(parents=True, exist_ok=True)
    with groups.open("wb") as file:
        asyncio.run(_process(config, args, file))
    print(groups)
    print(write_page(groups, groups.with_suffix(".html"), limit=args.num_groups))
    return 0


async def _process(config: RunConfig, args: argparse.Namespace, file: Any) -> None:
    from syncline.cli.sampling import open_policy, training_environment
    from syncline.envs.conversation import together
    from syncline.trajectory.wire import encode_group
    from syncline.types import RolloutGroup

    own = config.environments[args.index]
    name = own.name or own.task
    environment = training_environment(config, args.index)
    slots = asyncio.Semaphore(own.concurrency)
    temperature = config.sampling.temperature
    async with open_policy(config, args.engine_urls, temperature=temperature, unpublished_version=0) as policy:

        async def one(index: int) -> None:
            async with slots:
                task = environment.task(index, split=args.split)
                rollouts = await environment.rollouts(task, config.run.rollouts_per_group, policy)
            file.write(encode_group(RolloutGroup(f"{name}-{index}", name, index, tuple(rollouts))) + b"\n")
            file.flush()

        await together([one(index) for index in range(args.num_groups)])
