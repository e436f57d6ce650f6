"""Packed linear layers in vLLM: measured in its kernels' packing, their source by what the loader was handed."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from packed_models import SETTINGS, make_packed_model
from rank_digests import combined_together
from safetensors.torch import load_file

from syncline.bridges.receipt import parameter_digests
from syncline.engines.vllm.packed_experts import handed_to, witnessed
from syncline.engines.vllm.packed_layers import packed_layer_pieces
from syncline.errors import SyncError

pytest.importorskip("vllm")
NAME = "model.layers.0.self_attn.qkv_proj.qweight"
NEEDS_AMX = "fp8"
ROUNDING = {"fp8-channel": 0.06, "fp8": 0.06}
"""Relative, of a layer's outputs. The kernels of FP8 round what they multiply with to three bits of a mantissa."""


def layer(rank: int, ranks: int, *, weight: str = "qweight") -> Any:
    module: Any = torch.nn.Module()
    tensor = torch.arange(24, dtype=torch.int32).reshape(3, 8) + rank
    module.register_parameter(weight, torch.nn.Parameter(tensor, requires_grad=False))
    module.tp_rank, module.tp_size, module.quant_method = rank, ranks, SimpleNamespace()
    return module


@pytest.mark.parametrize("ranks", [1, 2])
def test_every_ranks_bytes_are_in_the_digest(ranks: int) -> None:
    def measured(spoilt: int | None = None) -> dict[str, str]:
        found = []
        for rank in range(ranks):
            module = layer(rank, ranks)
            if rank == spoilt:
                module.qweight.data[2, 7] += 1
            found.append(list(packed_layer_pieces(NAME, module.qweight.data, module)))
        return combined_together(found)

    assert list(measured()) == [f"repacked:{NAME}"]
    assert len({str(measured(spoilt)) for spoilt in (None, *range(ranks))}) == ranks + 1


@pytest.mark.parametrize("tensor", [torch.tensor(3.0), torch.ones(4, 6).t(), torch.ones(4, 6)[:, ::2]])
def test_scales_of_any_shape_are_bytes(tensor: torch.Tensor) -> None:
    module = layer(0, 1)
    [(_, shard)] = packed_layer_pieces("model.x.scales", tensor, module)
    assert shard.tensor.numel() == 4 * tensor.numel()
    assert shard.tensor.dtype == torch.uint8


@pytest.mark.parametrize("empty", [True, False])
def test_weights_kept_where_nobody_can_measure_them_are_refused(empty: bool) -> None:
    module = layer(0, 1, weight="qweight" if empty else "other")
    if empty:
        module.qweight.data = torch.empty(0)
    with pytest.raises(SyncError, match=r"scales: vLLM's SimpleNamespace keeps the weights where nobody can measure"):
        list(packed_layer_pieces("model.x.scales", torch.ones(2), module))


@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_what_is_handed_to_vllm_of_packed_layers_is_remembered(tmp_path: Path, name: str) -> None:
    stored = load_file(make_packed_model(tmp_path, name) / "model.safetensors")
    model = torch.nn.Module()
    passed = dict(witnessed(stored.items(), model, quantisation=SETTINGS[name][1]["quant_method"]))
    assert all(passed[key] is stored[key] for key in stored)
    expected = {key: tensor for key, tensor in stored.items() if "_proj." in key}
    assert handed_to(model) == parameter_digests(expected.items())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there a real engine shows it: tests/contracts")
def test_vllms_own_layers_have_the_learners_base_and_adapter_and_so_is_what_comes_of_them(tmp_path: Path) -> None:
    models = [f"{name}={make_packed_model(tmp_path / name, name)}" for name in SETTINGS]
    script = Path(__file__).parents[2] / "packed_in_vllm.py"
    done = subprocess.run([sys.executable, str(script), *models], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    found = {line.pop("name"): line for line in lines}
    assert found.keys() == SETTINGS.keys()
    if "requires AMX" in found[NEEDS_AMX].get("refused", ""):
        del found[NEEDS_AMX]
    for name, line in found.items():
        assert (line.get("refused"), line.get("base"), line.get("slots")) == (None, [], []), name
        assert len(line["repacked"]) >= 2, name
        assert line["layers"]["adapted"] < ROUNDING.get(name, 0.01), name
        assert line["layers"]["base"] > 0.2, f"{name}: the adapter changed nothing that could be seen"
