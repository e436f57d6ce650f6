"""The contract every weight bridge passes, against a real vLLM (its CPU build on a machine without a GPU)."""

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
import torch
from real_engine import make_tiny_model, run_values, running_engine
from transformers import AutoModelForCausalLM

from syncline.bridges.receipt import model_digest, parameter_digests
from syncline.bridges.restart import RestartBridge
from syncline.config.schema import Bridge
from syncline.engines.client import EngineClient, EngineController
from syncline.errors import EngineError, SyncError
from syncline.protocols import WeightBridge
from syncline.types import Completion, SamplingParams

pytestmark = pytest.mark.e2e
DEVICE, DTYPE, TOLERANCE = ("cuda", torch.bfloat16, 0.15) if torch.cuda.is_available() else ("cpu", torch.float32, 1e-4)
"""A stale tensor moves logprobs by 0.5 and more; bf16 kernels that round differently by a few hundredths."""
PROMPTS = tuple(tuple(range(5 + i, 12 + i)) for i in range(6))


def restart(side: "Side") -> WeightBridge:
    return RestartBridge(
        side.engine, Bridge(), export=lambda m: m.named_parameters(), folder=side.folder, assets=side.model_path
    )


BRIDGES: dict[str, Callable[["Side"], WeightBridge]] = {"restart": restart}


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

    def next_version(self) -> int:
        return self.engine.receipt().policy_version + 1

    def perturb(self, scale: float = 0.05) -> None:
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.add_(torch.randn_like(parameter) * scale)

    def sample(self, *, max_tokens: int = 12, prompts=PROMPTS) -> list[Completion]:
        async def sample() -> list[list[Completion]]:
            async with EngineClient(self.engine.url, timeout_seconds=60) as client:
                params = SamplingParams(max_tokens, temperature=0.8, seed=3)
                return await asyncio.gather(*(client.generate(p, params, num_completions=2) for p in prompts))

        return [completion for group in asyncio.run(sample()) for completion in group]

    def mismatch(self, prompts=PROMPTS) -> float:
        """The largest |Δlogprob| between what the engine says it sampled and the learner's model."""
        found = 0.0
        for i, completion in enumerate(self.sample(prompts=prompts)):
            prompt = prompts[i // 2]
            with torch.no_grad():
                token_ids = torch.tensor([[*prompt, *completion.token_ids]], device=DEVICE)
                logits = self.model(token_ids).logits[0].float().cpu() / 0.8
            rows = logits.log_softmax(-1)[len(prompt) - 1 : -1]
            learner = rows.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
            found = max(found, (learner - torch.tensor(completion.logprobs)).abs().max().item())
        return found


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
    bridge = side.bridge()
    bridge.attach(side.model)
    bridge.publish(side.model, policy_version=side.next_version())
    assert side.mismatch() < TOLERANCE
    side.perturb()
    version = side.next_version()
    report = bridge.publish(side.model, policy_version=version)
    expected = model_digest(parameter_digests(side.model.named_parameters()))
    assert report.receipt == side.engine.receipt()
    assert report.receipt.policy_version == version
    assert report.receipt.digest == expected
    assert side.mismatch() < TOLERANCE, "the tied lm_head, the fused layers or the prefix cache kept old weights"
    assert {span.policy_version for c in side.sample() for span in c.versions} == {version}


def test_publishing_unchanged_weights_moves_no_bytes(side: Side) -> None:
    bridge = side.bridge()
    bridge.publish(side.model, policy_version=side.next_version())
    version = side.next_version()
    report = bridge.publish(side.model, policy_version=version)
    assert report.num_bytes == 0
    assert side.engine.receipt().policy_version == version


def test_versions_only_grow(side: Side) -> None:
    bridge = side.bridge()
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
    bridge = side.bridge()
    bridge.publish(side.model, policy_version=side.next_version())
    with pytest.raises(RuntimeError, match="half-way"), bridge.updating():
        raise RuntimeError("half-way")
    _assert_paused_then_resume(side)


def test_requests_in_flight_end_under_one_version(side: Side) -> None:
    bridge = side.bridge()
    bridge.publish(side.model, policy_version=side.next_version())
    side.perturb(0.01)
    before, after = side.next_version() - 1, side.next_version()

    async def both() -> list[list[Completion]]:
        async with EngineClient(side.engine.url, timeout_seconds=120) as client:
            params = SamplingParams(60, seed=1)
            running = [asyncio.create_task(client.generate(p, params, num_completions=4)) for p in PROMPTS * 8]
            await asyncio.sleep(0.2)
            await asyncio.to_thread(bridge.publish, side.model, policy_version=after)
            running += [asyncio.create_task(client.generate(p, params)) for p in PROMPTS]
            return await asyncio.gather(*running)

    completions = [c for group in asyncio.run(both()) for c in group]
    assert all(len(c.versions) == 1 for c in completions)
    assert {c.versions[0].policy_version for c in completions} == {before, after}


def test_reload_of_a_running_engine_is_refused(side: Side) -> None:
    with pytest.raises(EngineError, match="pause it first"):
        side.engine.adopt(policy_version=side.next_version())


def _assert_paused_then_resume(side: Side) -> None:
    assert httpx.get(f"{side.engine.url}/health", timeout=10).json()["paused"] is True
    side.engine.resume()
    assert side.sample()
