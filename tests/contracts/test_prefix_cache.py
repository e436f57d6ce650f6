"""Keys and values of an older version are served to nobody, over any route, unless the config asks for it."""

import asyncio
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from real_engine import make_tiny_model, run_values, running_engine
from test_weight_bridge import DEVICE, TOLERANCE, Side, _copy

from syncline.config.schema import Bridge
from syncline.engines.client import EngineClient
from syncline.protocols import WeightBridge
from syncline.types import Completion, FinishReason, SamplingParams

pytestmark = pytest.mark.e2e
PROMPT = tuple(3 + i % 60 for i in range(300))
"""Longer than two of vLLM's blocks, which are 128 tokens on a CPU."""


@pytest.fixture(scope="module")
def side(tmp_path_factory) -> Iterator[Side]:
    folder = tmp_path_factory.mktemp("prefix-cache")
    model = make_tiny_model(folder / "model")
    values = run_values(model, folder / "run", bridge={"name": "shared"})
    values["model"]["max_length"] = 500
    values["engine"] |= {"device": DEVICE}
    values["learner"] = {"device": DEVICE}
    with running_engine(values, folder) as engine:
        yield Side("shared", engine, model, folder)


def ours(side: Side) -> Completion:
    async def sample() -> list[Completion]:
        async with EngineClient(side.engine.url, timeout_seconds=60) as client:
            return await client.generate(PROMPT, SamplingParams(8, temperature=0.8))

    return asyncio.run(sample())[0]


def openai(side: Side) -> Completion:
    asked = {"prompt": list(PROMPT), "max_tokens": 8, "temperature": 0.8, "logprobs": 0, "return_token_ids": True}
    model = httpx.get(f"{side.engine.url}/v1/models").json()["data"][0]["id"]
    answer = httpx.post(f"{side.engine.url}/v1/completions", json=asked | {"model": model}, timeout=60)
    [choice] = answer.raise_for_status().json()["choices"]
    logprobs, reason = choice["logprobs"]["token_logprobs"], FinishReason(choice["finish_reason"])
    return Completion(tuple(choice["token_ids"]), tuple(logprobs), (), reason)


def counted(side: Side, metric: str) -> float:
    """The sum of a counter of vLLM's."""
    lines = httpx.get(f"{side.engine.url}/metrics").raise_for_status().text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(f"vllm:{metric}_total"))


@pytest.mark.parametrize("sample", [ours, openai])
@pytest.mark.parametrize("in_flight", ["drain", "abort", "keep"])
def test_a_prompt_is_cached_within_a_version_and_computed_anew_under_the_next(
    side: Side, sample: Callable[[Side], Completion], in_flight: str
) -> None:
    bridge = side.attached(in_flight=in_flight)
    side.reset()
    bridge.publish(side.model, policy_version=side.next_version())
    for _ in range(2):
        side.step(bridge, scale=0.1)
        sample(side)
        before = counted(side, "prefix_cache_hits")
        completion = sample(side)
        assert counted(side, "prefix_cache_hits") > before, "nothing is shown: the prompt is never cached"
        assert side.difference(PROMPT, completion, side.model) < TOLERANCE


@pytest.mark.parametrize("frozen_kv", ["recompute", "reuse"])
def test_a_frozen_request_goes_on_from_its_own_keys_and_values_only_if_asked_to(side: Side, frozen_kv: str) -> None:
    config = Bridge.model_validate({"name": "shared", "in_flight": "keep", "frozen_kv": frozen_kv})
    bridge = side.bridge(config=config)
    bridge.attach(side.model)
    side.reset()
    bridge.publish(side.model, policy_version=side.next_version())
    preempted = counted(side, "num_preemptions")
    old, kept = _kept_over_a_step(side, bridge)
    before, after = (
        [side.span_difference(PROMPT, c, m, (c.versions[i].start, c.versions[i].end)) for c in kept]
        for i, m in enumerate((old, side.model))
    )
    assert max(before) < TOLERANCE
    if frozen_kv == "recompute":
        assert counted(side, "num_preemptions") > preempted
        assert max(after) < TOLERANCE
    else:
        assert counted(side, "num_preemptions") == preempted
        assert min(after) > 2 * TOLERANCE, "nothing is shown: the step changed too little"
    assert side.difference(PROMPT, ours(side), side.model) < TOLERANCE, "a new request was served a frozen one's blocks"


def _kept_over_a_step(side: Side, bridge: WeightBridge) -> tuple[Any, list[Completion]]:
    """The model before the step, and what was kept; another step where a busy machine was late and all had ended."""
    for _ in range(5):
        old = _copy(side.model)
        if kept := asyncio.run(_over_a_step(side, bridge)):
            return old, kept
    raise AssertionError("no request was kept over any of the steps")


async def _over_a_step(side: Side, bridge: WeightBridge) -> list[Completion]:
    """Completions that were running when the weights changed, and went on."""
    async with EngineClient(side.engine.url, timeout_seconds=60) as client:
        sampled, deadline = counted(side, "generation_tokens"), time.monotonic() + 30
        asking = asyncio.create_task(client.generate(PROMPT, SamplingParams(180, temperature=0.8), num_completions=8))
        while counted(side, "generation_tokens") < sampled + 40:
            assert time.monotonic() < deadline, "the request does not run"
            await asyncio.sleep(0.01)
        await asyncio.to_thread(side.step, bridge, scale=0.1)
        return [completion for completion in await asking if len(completion.versions) == 2]
