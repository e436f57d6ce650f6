"""What the verbs that sample share: an environment as training sees it, and the policy over running engines."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from syncline.config import RunConfig
from syncline.engines.pool import EnginePool
from syncline.envs.overlong import SoftLengthLimit
from syncline.envs.registry import build_environment
from syncline.envs.rendering import ChatPolicy, load_tokenizer
from syncline.protocols import Environment
from syncline.types import SamplingParams


def training_environment(config: RunConfig, index: int) -> Environment:
    """`environments.<index>`, its soft length limit around it."""
    own = config.environments[index]
    environment = build_environment(own, position=index, seed=config.run.seed)
    if own.overlong:
        return SoftLengthLimit(environment, own.overlong, max_tokens=config.sampling.max_tokens)
    return environment


@asynccontextmanager
async def open_policy(
    config: RunConfig, engine_urls: Sequence[str], *, temperature: float, unpublished_version: int | None = None
) -> AsyncIterator[ChatPolicy]:
    tokenizer = load_tokenizer(config.model.tokenizer or config.model.path)
    sampling = SamplingParams(config.sampling.max_tokens, temperature=temperature)
    timeout = config.engine.request_timeout_seconds
    async with EnginePool(engine_urls, timeout_seconds=timeout, unpublished_version=unpublished_version) as engine:
        yield ChatPolicy(tokenizer, engine, sampling, max_length=config.model.max_length)
