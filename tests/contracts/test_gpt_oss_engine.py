"""GPT-OSS with an MXFP4 base in a real vLLM: adapters of attention and experts by `lora`, the base never packed again.

On a CPU the experts are `plain_experts`; on a GPU vLLM's own Marlin kernels.
"""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from gpt_oss_models import needs_experts, recipe
from peft import PeftModel
from real_engine import run_values, running_engine

from syncline.bridges.lora import LoraBridge
from syncline.bridges.repacked import is_repacked
from syncline.config.schema import Bridge, Lora, Model
from syncline.engines.client import EngineClient, EngineController
from syncline.errors import SyncError
from syncline.learner.adapter import AdapterLayers, frozen_base, plain_parameters
from syncline.learner.model import Scorer, load_model, trainable_parameters
from syncline.learner.mxfp4 import is_expert
from syncline.learner.packing import pack_samples
from syncline.types import SamplingParams, TrainingSample

pytestmark = [needs_experts, pytest.mark.e2e, pytest.mark.slow, pytest.mark.contract("lora", 1)]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LORA = {
    "rank": 4,
    "alpha": 8,
    "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
}
TOLERANCE = 0.15 if DEVICE.type == "cuda" else 0.1
"""Of the mean |Δlogprob|: bfloat16 on both sides, and large random steps."""
PROMPTS = tuple(tuple(range(9 + i, 30 + i)) for i in range(4))


class Side:
    """A learner of an adapter over a packed base, and the engine that keeps the base as it is."""

    def __init__(self, engine: EngineController, path: Path, folder: Path, lora: dict[str, Any]) -> None:
        self.engine, self.path, self.folder, self.lora = engine, path, folder, lora
        self.model = self.load(path)
        self.version = -1

    def load(self, path: Path) -> Any:
        torch.manual_seed(0)
        settings = Model(path=str(path), dtype="bfloat16", lora=Lora.model_validate(self.lora))
        return load_model(settings, device=DEVICE)

    def attached(self, model: Any = None, path: Path | None = None, **config: Any) -> LoraBridge:
        base, stored = frozen_base(path or self.path)
        bridge = LoraBridge(
            [self.engine],
            Bridge(name="lora", **config),
            base=base,
            stored=stored,
            layers=AdapterLayers(),
            folder=self.folder,
        )
        bridge.attach(model or self.model)
        return bridge

    @torch.no_grad()
    def step(self, bridge: LoraBridge, *, only: str = "", scale: float = 0.05) -> Any:
        for name, parameter in trainable_parameters(self.model):
            if only in name:
                parameter.add_(torch.randn_like(parameter) * scale)
        self.version += 1
        return bridge.publish(self.model, policy_version=self.version)

    def sampled(self) -> list[TrainingSample]:
        async def sample() -> list[TrainingSample]:
            async with EngineClient(self.engine.url, timeout_seconds=60) as client:  # type: ignore[attr-defined]
                answers = await asyncio.gather(*(client.generate(p, SamplingParams(24)) for p in PROMPTS))
            return [TrainingSample.from_completion(p, c) for p, [c] in zip(PROMPTS, answers, strict=True)]

        return asyncio.run(sample())

    def difference(self, samples: list[TrainingSample], model: Any = None) -> float:
        found = []
        for batch in pack_samples(samples, token_budget=512):
            batch = batch.to(DEVICE)
            scored = Scorer(1.0, chunk_tokens=64).score_without_grad(model or self.model, batch)
            found.append((scored - batch.sampler_logprobs).abs())
        return torch.cat(found).mean().item()


@pytest.fixture(scope="module")
def side(tmp_path_factory) -> Iterator[Side]:
    folder = tmp_path_factory.mktemp("gpt-oss")
    path = recipe("small_model").build(folder / "model")
    values = run_values(path, folder / "run", bridge={"name": "lora"})
    values["model"] |= {"lora": LORA, "dtype": "bfloat16"}
    with running_engine(values, folder) as engine:
        yield Side(engine, path, folder / "adapters", LORA)


def test_learner_and_engine_agree_after_every_publish_and_not_before(side: Side) -> None:
    bridge = side.attached()
    side.step(bridge, scale=0.0)
    assert side.difference(side.sampled()) < TOLERANCE
    for only in ("experts", "self_attn"):
        before = side.sampled()
        report = side.step(bridge, only=only, scale=0.1)
        assert report.receipt == side.engine.receipt()
        after = side.difference(side.sampled())
        assert after < TOLERANCE
        assert side.difference(before) > 2 * after, f"the step of {only} changed nothing that could be seen"


def test_every_part_of_the_base_is_in_the_digest(side: Side) -> None:
    """What was handed to vLLM of the experts, under the checkpoint's names, and what its kernels read."""
    side.step(side.attached())
    told = side.engine.parameters()
    assert len([name for name in told if is_expert(name) and not is_repacked(name) and "lora" not in name]) == 2 * 6
    assert {name.rpartition(".")[2] for name in told if is_repacked(name)} == {
        f"{matrix}_{kind}" for matrix in ("w13", "w2") for kind in ("weight", "weight_scale", "bias")
    }
    assert {name for name, _ in plain_parameters(side.model)} < told.keys()


def test_files_reach_the_engine_too_and_are_an_adapter_peft_loads(side: Side) -> None:
    side.step(side.attached(adapter_transfer="files"), scale=0.05)
    samples = side.sampled()
    assert side.difference(samples) < TOLERANCE
    plain = load_model(Model(path=str(side.path), dtype="bfloat16"), device=DEVICE)
    loaded = PeftModel.from_pretrained(plain, max(side.folder.glob("adapter-*")))
    assert side.difference(samples, loaded) < TOLERANCE


def test_a_learner_of_other_experts_is_refused_by_their_names(side: Side, tmp_path: Path) -> None:
    other = recipe("small_model").build(tmp_path / "other", seed=1)
    with pytest.raises(SyncError, match=r"serves another base.*(?s:.)*experts\.down_proj_blocks"):
        side.attached(side.load(other), other)
