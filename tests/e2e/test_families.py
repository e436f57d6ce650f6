"""Every model family that is promised, through `shared`: learner and real engine score the same tokens alike.

Parity proves what the digest cannot: rope scaling, windows, softcaps and biases are computed by each side for itself.
"""

import asyncio
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from model_families import DENSE, EXPERT, save_random_model
from real_engine import run_values, running_engine

from syncline.bridges.shared import SharedBridge
from syncline.config.schema import Bridge, Model
from syncline.engines.client import EngineClient, EngineController
from syncline.learner.model import Scorer, checkpoint_shards, load_model
from syncline.learner.packing import pack_samples
from syncline.types import SamplingParams, TrainingSample

pytestmark = pytest.mark.e2e
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCE = 0.15 if DEVICE.type == "cuda" else 1e-4
"""Of a completion's mean |Δlogprob|: bf16 kernels that round differently, or float32 ones."""
TEMPERATURE = 0.8
PROMPTS = tuple(tuple(range(5 + i, 17 + i)) for i in range(6))
SAMPLING = SamplingParams(24, temperature=TEMPERATURE, seed=3)
"""Prompt and completion are longer than the windows of the families that have one."""


def engine_values(model_path: Path, folder: Path) -> dict[str, Any]:
    values = run_values(model_path, folder / "run", bridge={"name": "shared"})
    if DEVICE.type == "cuda":
        # one process less to start, nineteen times
        values["engine"]["extra"] |= {"moe_backend": "triton", "distributed_executor_backend": "uni"}
    return values


IN_EVERY_RUN = ("gemma2", "mixtral")
"""The other families, an engine start each, are proved by `make families` (and all of them on a GPU)."""


def families(known: Iterable[str]) -> list[Any]:
    return [pytest.param(name, marks=[] if name in IN_EVERY_RUN else [pytest.mark.slow]) for name in known]


@pytest.mark.parametrize("family", families(DENSE))
def test_learner_and_engine_agree_on_one_copy_of_the_weights(family: str, tmp_path: Path) -> None:
    assert_parity(family, tmp_path)


@pytest.mark.parametrize("family", families(EXPERT))
@pytest.mark.skipif(DEVICE.type == "cpu", reason="see the refusal below: vLLM's CPU build repacks experts")
def test_learner_and_engine_agree_on_one_copy_of_fused_experts(family: str, tmp_path: Path) -> None:
    assert_parity(family, tmp_path)


@pytest.mark.parametrize("family", families(EXPERT))
@pytest.mark.skipif(DEVICE.type == "cuda", reason="see the parity above: Triton kernels read the checkpoint's layout")
def test_experts_that_the_engine_repacks_are_refused_by_name(family: str, tmp_path: Path) -> None:
    model_path = save_random_model(family, tmp_path / "model")
    with (
        pytest.raises(AssertionError, match=r"experts: mixture-of-experts layers are repacked by vLLM's CPU build"),
        running_engine(engine_values(model_path, tmp_path), tmp_path),
    ):
        pass


def assert_parity(family: str, folder: Path) -> None:
    """As loaded, and after a step that moves every parameter of the one copy."""
    model_path = save_random_model(family, folder / "model")
    with running_engine(engine_values(model_path, folder), folder) as engine:
        model: Any = load_model(Model(path=str(model_path)), device=DEVICE)
        bridge = SharedBridge([engine], Bridge(name="shared"), shards=checkpoint_shards)
        bridge.attach(model)
        bridge.publish(model, policy_version=0)
        before = asyncio.run(sampled(engine))
        assert largest_difference(model, before) < TOLERANCE
        with bridge.updating():
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn_like(parameter) * 0.05)
            bridge.publish(model, policy_version=1)
        after = asyncio.run(sampled(engine))
        assert largest_difference(model, after) < TOLERANCE
        assert largest_difference(model, before) > 2 * TOLERANCE, "the step changed nothing that could be seen"


async def sampled(engine: EngineController) -> list[TrainingSample]:
    async with EngineClient(engine.url, timeout_seconds=60) as client:  # type: ignore[attr-defined]
        groups = await asyncio.gather(*(client.generate(p, SAMPLING, num_completions=2) for p in PROMPTS))
    return [
        TrainingSample.from_completion(prompt, completion)
        for prompt, completions in zip(PROMPTS, groups, strict=True)
        for completion in completions
    ]


def largest_difference(model: torch.nn.Module, samples: list[TrainingSample]) -> float:
    """The largest mean |Δlogprob| of a completion: what the engine said against the learner's packed forward pass."""
    scorer = Scorer(TEMPERATURE, chunk_tokens=64)
    differences = []
    for batch in pack_samples(samples, token_budget=256):
        scored = scorer.score_without_grad(model, batch.to(DEVICE)).cpu()
        difference = (scored - batch.sampler_logprobs).abs()
        differences += [difference[batch.sample_index == i].mean().item() for i in batch.sample_index.unique()]
    return max(differences)
