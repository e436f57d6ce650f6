"""vLLM's engine behind our gate: every request is marked with the weights whose keys and values it may use.

vLLM tells blocks of its prefix cache apart by their tokens, their adapter and the request's `cache_salt`, not by the
weights that filled them. All of vLLM's routes that sample hand their requests to `AsyncLLM.add_request`. Here such a
request waits for the gate to be open, gets the gate's salt, and is inside until the engine core has it; so a pause that
leaves no request unfinished need not empty the cache: no later request can match what is in it.
"""

from argparse import Namespace
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from syncline.engines.vllm.gate import Gate, Visit
from syncline.engines.vllm.plugin import SCHEDULERS
from syncline.errors import ConfigError


@asynccontextmanager
async def engine_behind(gate: Gate, args: Namespace) -> AsyncIterator[Any]:
    """vLLM's engine client, as its own server builds it. Our routes use `add_visit`, as they have passed the gate."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.usage.usage_lib import UsageContext

    try:
        engine_args = AsyncEngineArgs.from_cli_args(args)
        config = engine_args.create_engine_config(usage_context=UsageContext.OPENAI_API_SERVER)
    except (OSError, ValueError) as error:
        raise ConfigError([f"model.path: vLLM cannot serve {args.model!r} so: {error}"]) from error
    if config.scheduler_config.scheduler_cls is None:
        name = "HoldingAsyncScheduler" if config.scheduler_config.async_scheduling else "HoldingScheduler"
        config.scheduler_config.scheduler_cls = f"{SCHEDULERS}.{name}"
    engine = _gated(gate).from_vllm_config(
        vllm_config=config,
        usage_context=UsageContext.OPENAI_API_SERVER,
        enable_log_requests=engine_args.enable_log_requests,
        aggregate_engine_logging=engine_args.aggregate_engine_logging,
        disable_log_stats=engine_args.disable_log_stats,
    )
    try:
        await engine.reset_mm_cache()  # images of the start's profiling
        yield engine
    finally:
        engine.shutdown(timeout=config.shutdown_timeout)


def _gated(gate: Gate) -> Any:
    from vllm.v1.engine.async_llm import AsyncLLM

    class GatedLLM(AsyncLLM):
        async def add_request(self, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
            async with gate.request(request_id) as visit:
                return await super().add_request(request_id, salted(prompt, visit.salt), params, *args, **kwargs)

        async def add_visit(self, visit: Visit, prompt: Any, params: Any, **kwargs: Any) -> Any:
            return await super().add_request(visit.request_id, salted(prompt, visit.salt), params, **kwargs)

    return GatedLLM


def salted(prompt: Any, salt: str) -> Any:
    """The prompt with the salt beside its own. Raises `ValueError` for one that has no place for it."""
    if isinstance(prompt, str):
        prompt = {"prompt": prompt}
    elif isinstance(prompt, list | tuple):
        prompt = {"prompt_token_ids": list(prompt)}
    if isinstance(prompt, Mapping):
        if not {"encoder_prompt", "encoder_inputs"} & prompt.keys():
            return {**prompt, "cache_salt": _joined(salt, prompt.get("cache_salt"))}
    elif hasattr(prompt, "cache_salt"):
        prompt.cache_salt = _joined(salt, prompt.cache_salt)
        return prompt
    raise ValueError(f"a prompt of type {type(prompt).__name__} cannot be kept apart from other versions' cache")


def _joined(salt: str, own: str | None) -> str:
    return f"{salt}:{own}" if own else salt
