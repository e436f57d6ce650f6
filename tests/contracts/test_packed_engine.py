"""Packed bases (GPTQ, AWQ, compressed-tensors) in a real vLLM: adapters by `lora`, the base as it is stored."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from packed_models import make_packed_model
from real_engine import run_values, running_engine
from safetensors.torch import load_file
from test_gpt_oss_engine import Side

from syncline.bridges.adapter import is_adapter_name
from syncline.bridges.repacked import is_repacked
from syncline.bridges.verify import faults_of
from syncline.errors import SyncError

pytestmark = [pytest.mark.e2e, pytest.mark.slow]
LORA = {"rank": 4, "alpha": 8}
SIZE = {"fp8": 256}
"""Of which keys and values are whole blocks each: vLLM has no places for the scales of less."""
ROUNDED = {"fp8-channel": 0.2, "fp8": 0.2}
TOLERANCE = 0.05
"""Of the mean |Δlogprob|: bfloat16 on both sides. FP8's kernels round what they multiply with, too."""


def _engines() -> Iterator[object]:
    """FP8 by blocks is refused by `config.model_folder` until a GPU has passed this."""
    names = (("gptq", 1), ("gptq", 2), ("awq", 1), ("w4a16", 1), ("fp8-channel", 1))
    for name, ranks in (*names, ("fp8", 1)) if torch.cuda.is_available() else names:
        few = pytest.mark.skipif(0 < torch.cuda.device_count() < ranks, reason=f"needs {ranks} GPUs")
        yield pytest.param((name, ranks), id=f"{name}-tp{ranks}", marks=[pytest.mark.contract("lora", ranks), few])


class Packed(Side):
    name = ""

    @property
    def tolerance(self) -> float:
        return ROUNDED.get(self.name, TOLERANCE)


@pytest.fixture(scope="module", params=_engines())
def side(request, tmp_path_factory) -> Iterator[Packed]:
    name, ranks = request.param
    folder = tmp_path_factory.mktemp(f"{name}-{ranks}")
    path = make_packed_model(folder / "model", name, hidden_size=SIZE.get(name, 128))
    values = run_values(path, folder / "run", bridge={"name": "lora"})
    values["model"] |= {"lora": LORA, "dtype": "bfloat16"}
    values["engine"] |= {"tensor_parallel_size": ranks, "devices": list(range(ranks))}
    # DeepGEMM quantises weights again, to scales that are powers of two
    with running_engine(values, folder, environment={"VLLM_USE_DEEP_GEMM": "0"}) as engine:
        found = Packed(engine, path, folder / "adapters", LORA)
        found.name = name
        yield found


def test_learner_and_engine_agree_after_every_publish_and_not_before(side: Packed) -> None:
    bridge = side.attached()
    side.step(bridge, scale=0.0)
    differences = [side.difference(side.sampled())]
    for _ in range(2):
        before = side.sampled()
        report = side.step(bridge, scale=0.1)
        assert report.receipt == side.engine.receipt()
        differences.append(side.difference(side.sampled()))
        assert side.difference(before) > 2 * differences[-1], "the step changed nothing that could be seen"
    print(side.name, differences)
    assert max(differences) < side.tolerance


def test_every_part_of_the_base_is_in_the_digest(side: Packed) -> None:
    """All that was handed to vLLM of packed layers, under the checkpoint's names, and what its kernels read."""
    side.step(side.attached())
    told = side.engine.parameters()
    assert load_file(side.path / "model.safetensors").keys() <= told.keys()
    layers = {name.rpartition(".")[0].rpartition(".")[2] for name in told if is_repacked(name)}
    assert layers == {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}
    assert faults_of(side.path, {name: told[name] for name in told if not is_adapter_name(name)}) == []


def test_a_learner_of_another_base_is_refused_by_its_layers_names(side: Packed, tmp_path: Path) -> None:
    other = make_packed_model(tmp_path / "other", side.name, seed=1, hidden_size=SIZE.get(side.name, 128))
    with pytest.raises(SyncError, match=r"serves another base.*(?s:.)*(_proj|_layernorm|norm|embed_tokens)\."):
        side.attached(side.load(other), other)
