"""`syncline evaluate FILE`: accuracy on the environments' held-out tasks, against a running engine."""

import argparse
import asyncio
import json
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from syncline.config import RunConfig, load
from syncline.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", help="the run's YAML file; evaluation.num_tasks says how many tasks")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c")
    parser.add_argument("--engine-url", dest="engine_urls", metavar="URL", action="append", required=True)
    parser.add_argument("--out", type=Path, required=True, help="where the JSON goes")


def run(args: argparse.Namespace) -> int:
    from syncline.observe.files import write_atomically
    from syncline.observe.logs import set_up_logging

    set_up_logging()
    config = load(args.file, args.overrides)
    if config.evaluation.num_tasks == 0:
        raise ConfigError(["evaluation.num_tasks: 0 evaluates nothing; set it to the tasks of each environment"])
    result = asyncio.run(_evaluate(config, engine_urls=args.engine_urls))
    write_atomically(args.out, json.dumps(result, indent=2) + "\n")
    for one in result["environments"]:
        interval = " [{:.3f}, {:.3f}]".format(*one["interval"]) if one["interval"] else ""
        print(f"held-out {one['environment']}: accuracy {one['accuracy']:.3f}{interval} on {one['num_scored']} tasks")
    return 0


async def _evaluate(config: RunConfig, *, engine_urls: list[str]) -> dict[str, Any]:
    from syncline.engines.pool import EnginePool
    from syncline.envs.evaluate import evaluate
    from syncline.envs.registry import build_environment
    from syncline.envs.rendering import ChatPolicy, load_tokenizer
    from syncline.types import SamplingParams

    tokenizer = load_tokenizer(config.model.tokenizer or config.model.path)
    sampling = SamplingParams(config.sampling.max_tokens, temperature=config.evaluation.temperature)
    timeout = config.engine.request_timeout_seconds
    async with EnginePool(engine_urls, timeout_seconds=timeout, unpublished_version=0) as engine:
        policy = ChatPolicy(tokenizer, engine, sampling, max_length=config.model.max_length)
        found = [
            await evaluate(
                build_environment(own, position=i, seed=config.run.seed),
                policy,
                num_tasks=config.evaluation.num_tasks,
                name=own.name or own.task,
                timeout_seconds=timeout,
                concurrency=own.concurrency,
            )
            for i, own in enumerate(config.environments)
        ]
    return {"accuracy": fmean(e.accuracy for e in found), "environments": [asdict(e) for e in found]}
