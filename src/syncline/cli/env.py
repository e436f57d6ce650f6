"""`syncline env FILE`: one environment's worker: takes tasks, samples groups, scores, posts."""

import argparse
import asyncio
import os

from syncline.config import RunConfig, load


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", help="the run's YAML file")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c")
    parser.add_argument("--index", type=int, default=0, help="which of the file's environments, from 0")
    parser.add_argument("--engine-url", dest="engine_urls", metavar="URL", action="append", required=True)
    parser.add_argument("--trajectories-url", required=True)


def run(args: argparse.Namespace) -> int:
    from syncline.observe.logs import set_up_logging

    set_up_logging()
    config = load(args.file, args.overrides)
    asyncio.run(_work(config, args.index, engine_urls=args.engine_urls, trajectories_url=args.trajectories_url))
    return 0


async def _work(config: RunConfig, index: int, *, engine_urls: list[str], trajectories_url: str) -> None:
    from syncline.engines.pool import EnginePool
    from syncline.envs.overlong import SoftLengthLimit
    from syncline.envs.registry import build_environment
    from syncline.envs.rendering import ChatPolicy, load_tokenizer
    from syncline.envs.worker import EnvironmentWorker
    from syncline.trajectory.client import TrajectorySink
    from syncline.trajectory.guard import TOKEN_VARIABLE
    from syncline.types import SamplingParams

    own = config.environments[index]
    environment = build_environment(own, position=index, seed=config.run.seed)
    if own.overlong:
        environment = SoftLengthLimit(environment, own.overlong, max_tokens=config.sampling.max_tokens)
    tokenizer = load_tokenizer(config.model.tokenizer or config.model.path)
    sampling = SamplingParams(config.sampling.max_tokens, temperature=config.sampling.temperature)
    timeout_seconds = config.engine.request_timeout_seconds
    async with (
        EnginePool(engine_urls, timeout_seconds=timeout_seconds) as engine,
        TrajectorySink(trajectories_url, token=os.environ.get(TOKEN_VARIABLE)) as sink,
    ):
        worker = EnvironmentWorker(
            environment,
            ChatPolicy(tokenizer, engine, sampling, max_length=config.model.max_length),
            sink=sink,
            name=own.name or own.task,
            rollouts_per_group=config.run.rollouts_per_group,
            concurrency=own.concurrency,
            group_timeout_seconds=timeout_seconds,
        )
        await worker.run_until_signal()
