"""The contract every weight bridge passes, against a real vLLM (its CPU build on a machine without a GPU)."""

import asyncio
import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from real_engine import make_tiny_model, run_values, running_engine
from transformers import AutoModelForCausalLM

from syncline.bridges.broadcast import BroadcastBridge
from syncline.bridges.receipt import model_digest, parameter_digests
from syncline.bridges.restart import RestartBridge
from syncline.bridges.shared import SharedBridge
from syncline.config.schema import Bridge
from syncline.engines.client import EngineClient, EngineController
from syncline.errors import EngineError, SyncError
from syncline.protocols import SyncReport, WeightBridge
from syncline.types import Completion, SamplingParams

pytestmark = pytest.mark.e2e
DEVICE, DTYPE, TOLERANCE = ("cuda", torch.bfloat16, 0.15) if torch.cuda.is_available() else ("cpu", torch.float32, 1e-4)
"""Of a completion's mean |Δlogprob|. A stale tensor moves it by 0.5 and more; bf16 kernels that round differently by
a few hundredths, more as the random weights grow."""
PROMPTS = tuple(tuple(range(5 + i, 12 + i)) for i in range(6))


def restart(side: "Side") -> WeightBridge:
    return RestartBridge(
        side.engine, Bridge(), export=lambda m: m.named_parameters(), folder=side.folder, assets=side.model_path
    )


def shared(side: "Side") -> WeightBridge:
    return SharedBridge(side.engine, Bridge(name="shared"), parameters=lambda m: m.named_parameters())


def broadcast(side: "Side") -> WeightBridge:
    config = Bridge(name="broadcast", bucket_bytes=200_000, timeout_seconds=60)  # a few buckets, not one
    return BroadcastBridge([side.engine], config, export=lambda m: m.named_parameters())


BRIDGES: dict[str, Callable[["Side"], WeightBridge]] = {"restart": restart, "shared": shared, "broadcast": broadcast}


class Side:
    """Both sides of a bridge: a learner's model and the engine that should follow it."""

    def __init__(
        self, make_bridge: Callable[["Side"], WeightBridge], engine: EngineController, model_path: Path, folder: Path
    ) -> None:
        self.engine = engine
        self.model_path = model_path
        self.model = AutoModelForCausalLM.from_pretrained(model_path, dtype=DTYPE).to(DEVICE)
        self.folder = folder
        self._make_bridge = make_bridge

    def bridge(self) -> WeightBridge:
        return self._make_bridge(self)

    def attached(self) -> WeightBridge:
        bridge = self.bridge()
        bridge.attach(self.model)
        return bridge

    def next_version(self) -> int:
        return self.engine.receipt().policy_version + 1

    def step(self, bridge: WeightBridge, *, scale: float = 0.05) -> SyncReport:
        """What a training step does to the weights, as the loop does it."""
        with bridge.updating():
            with torch.no_grad():
                for parameter in self.model.parameters():
                    parameter.add_(torch.randn_like(parameter) * scale)
            return bridge.publish(self.model, policy_version=self.next_version())

    def sample(self, *, max_tokens: int = 12, prompts=PROMPTS) -> list[Completion]:
        async def sample() -> list[list[Completion]]:
            async with EngineClient(self.engine.url, timeout_seconds=60) as client:
                params = SamplingParams(max_tokens, temperature=0.8, seed=3)
                return await asyncio.gather(*(client.generate(p, params, num_completions=2) for p in prompts))

        return [completion for group in asyncio.run(sample()) for completion in group]

    def mismatch(self, prompts=PROMPTS) -> float:
        """The largest mean |Δlogprob| of a completion: what the engine says it sampled against the learner's model."""
        completions = self.sample(prompts=prompts)
        return max(self.difference(prompts[i // 2], c, self.model) for i, c in enumerate(completions))

    @staticmethod
    @torch.no_grad()
    def difference(prompt: tuple[int, ...], completion: Completion, model: Any) -> float:
        token_ids = torch.tensor([[*prompt, *completion.token_ids]], device=DEVICE)
        logits = model(token_ids).logits[0].float().cpu() / 0.8
        rows = logits.log_softmax(-1)[len(prompt) - 1 : -1]
        learner = rows.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
        return (learner - torch.tensor(completion.logprobs)).abs().mean().item()


def _copy(model: Any) -> Any:
    """The model as it is now, in memory of its own."""
    return copy.deepcopy(model)


@pytest.fixture(scope="module", params=sorted(BRIDGES))
def side(request, tmp_path_factory) -> Iterator[Side]:
    folder = tmp_path_factory.mktemp(request.param)
    model_path = make_tiny_model(folder / "model")
    with running_engine(run_values(model_path, folder / "run"), folder) as engine:
        yield Side(BRIDGES[request.param], engine, model_path, folder / "weights")


def test_before_the_first_publish_no_version_is_claimed(side: Side) -> None:
    if side.engine.receipt().policy_version >= 0:
        pytest.fail("this test runs first: a fresh engine must answer with version -1")
    assert all(completion.versions == () for completion in side.sample(max_tokens=3))


def test_publish_proves_the_digest_and_the_engine_samples_from_the_learners_weights(side: Side) -> None:
    bridge = side.attached()
    bridge.publish(side.model, policy_version=side.next_version())
    assert side.mismatch() < TOLERANCE
    version = side.next_version()
    report = side.step(bridge)
    expected = model_digest(parameter_digests(side.model.named_parameters()))
    assert report.receipt == side.engine.receipt()
    assert report.receipt.policy_version == version
    assert report.receipt.digest == expected
    assert side.mismatch() < TOLERANCE, "the tied lm_head, the fused layers or the prefix cache kept old weights"
    assert {span.policy_version for c in side.sample() for span in c.versions} == {version}


def test_publishing_unchanged_weights_moves_no_bytes(side: Side) -> None:
    bridge = side.attached()
    bridge.publish(side.model, policy_version=side.next_version())
    version = side.next_version()
    report = bridge.publish(side.model, policy_version=version)
    assert report.num_bytes == 0
    assert side.engine.receipt().policy_version == version


def test_versions_only_grow(side: Side) -> None:
    bridge = side.attached()
    version = side.next_version()
    bridge.publish(side.model, policy_version=version)
    with pytest.raises(SyncError, match=f"older than {version}"):
        bridge.publish(side.model, policy_version=version - 1)
    _assert_paused_then_resume(side)


def test_a_model_the_engine_does_not_serve_is_refused_by_parameter_name(side: Side, tmp_path: Path) -> None:
    other = AutoModelForCausalLM.from_pretrained(
        make_tiny_model(tmp_path / "other", hidden_size=64, tied=False), dtype=DTYPE
    )
    with pytest.raises(SyncError, match=r"lm_head\.weight: missing in the engine"):
        side.bridge().attach(other)


def test_a_failure_while_the_weights_move_leaves_the_engine_paused(side: Side) -> None:
    bridge = side.attached()
    bridge.publish(side.model, policy_version=side.next_version())
    with pytest.raises(RuntimeError, match="half-way"), bridge.updating():
        raise RuntimeError("half-way")
    _assert_paused_then_resume(side)


def test_requests_in_flight_end_under_one_version_and_are_never_torn(side: Side) -> None:
    """Steps move every weight while requests run: each completion must be of one version, and of its weights alone."""
    bridge = side.attached()
    bridge.publish(side.model, policy_version=side.next_version())
    weights = {side.next_version() - 1: _copy(side.model)}

    async def steps() -> list[list[Completion]]:
        async with EngineClient(side.engine.url, timeout_seconds=120) as client:
            params = SamplingParams(40, temperature=0.8, seed=1)
            running = []
            for _ in range(3):
                running += [asyncio.create_task(client.generate(p, params, num_completions=2)) for p in PROMPTS * 4]
                await asyncio.sleep(0.1)
                await asyncio.to_thread(side.step, bridge, scale=0.1)
                weights[side.next_version() - 1] = _copy(side.model)
            running += [asyncio.create_task(client.generate(p, params, num_completions=2)) for p in PROMPTS * 4]
            return await asyncio.gather(*running)

    groups = asyncio.run(steps())
    seen = set()
    for i, completion in enumerate(c for group in groups for c in group):
        [span] = completion.versions
        seen.add(span.policy_version)
        assert side.difference(PROMPTS[(i // 2) % len(PROMPTS)], completion, weights[span.policy_version]) < TOLERANCE
    assert len(seen) >= 2, "no request was in flight while the weights moved"


def test_reload_of_a_running_engine_is_refused(side: Side) -> None:
    with pytest.raises(EngineError, match="pause it first"):
        side.engine.adopt(policy_version=side.next_version())


def _assert_paused_then_resume(side: Side) -> None:
    assert httpx.get(f"{side.engine.url}/health", timeout=10).json()["paused"] is True
    side.engine.resume()
    assert side.sample()
