"""What vLLM keeps of MXFP4 experts is measured as it is; what it was handed is remembered by the checkpoint's names."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gpt_oss_models import recipe
from rank_digests import combined_together
from real_engine import run_values
from safetensors.torch import load_file

from syncline.bridges.receipt import parameter_digests
from syncline.config import resolve
from syncline.engines.vllm.arguments import Start, _options
from syncline.engines.vllm.names import CheckpointNames
from syncline.engines.vllm.packed_experts import (
    GPT_OSS_MXFP4,
    handed_to,
    is_packed,
    repacked_pieces,
    stored_format,
    witnessed,
)
from syncline.errors import ConfigError, SyncError

pytest.importorskip("vllm")
NAME = "model.layers.0.mlp.experts.routed_experts.w13_weight"
PARAMETERS = ("w13_weight", "w2_weight", "w13_weight_scale", "w2_weight_scale")


def experts(rank: int = 0, ranks: int = 1, *, kept: tuple[str, ...] = PARAMETERS, wrapped: bool = True) -> Any:
    module: Any = torch.nn.Module()
    for name in kept:
        tensor = torch.arange(48, dtype=torch.int32).reshape(2, 3, 8) + rank
        module.register_parameter(name, torch.nn.Parameter(tensor, requires_grad=False))
    method = SimpleNamespace(mxfp4_backend=SimpleNamespace(name="MARLIN"))
    module.quant_method = SimpleNamespace(old_quant_method=method) if wrapped else method
    module.moe_config = SimpleNamespace(moe_parallel_config=SimpleNamespace(tp_rank=rank, tp_size=ranks))
    return module


@pytest.mark.parametrize("ranks", [1, 2])
def test_every_ranks_bytes_are_in_the_digest(ranks: int) -> None:
    def measured(spoilt: int | None = None) -> dict[str, str]:
        found = []
        for rank in range(ranks):
            module = experts(rank, ranks)
            if rank == spoilt:
                module.w13_weight.data[1, 2, 7] += 1
            found.append(list(repacked_pieces(NAME, module.w13_weight.data, module)))
        return combined_together(found)

    assert list(measured()) == [f"repacked:{NAME}"]
    assert f"uint8[{ranks}, 2, 3, 32]" in measured()[f"repacked:{NAME}"]
    assert len({str(measured(spoilt)) for spoilt in (None, *range(ranks))}) == ranks + 1


def test_weights_kept_where_nobody_can_measure_them_are_refused() -> None:
    module = experts(kept=PARAMETERS[:1])
    assert is_packed(module) and is_packed(experts(wrapped=False))
    with pytest.raises(SyncError, match=r"MARLIN kernels keep w13_weight_scale, w2_weight, .*moe_backend: marlin"):
        list(repacked_pieces(NAME, module.w13_weight.data, module))


def test_what_is_handed_to_vllm_goes_on_as_it_is_and_is_remembered(tmp_path: Path) -> None:
    stored = load_file(recipe("small_model").build(tmp_path) / "model.safetensors")
    model = torch.nn.Module()
    passed = dict(witnessed(stored.items(), model, quantisation=GPT_OSS_MXFP4))
    assert all(passed[name] is stored[name] for name in stored)
    expected = {name: tensor for name, tensor in stored.items() if ".experts." in name}
    assert handed_to(model) == parameter_digests(expected.items())
    list(witnessed(stored.items(), model, quantisation=None))
    assert handed_to(model) == {}


def test_every_parameter_of_vllms_model_has_the_checkpoints_name(tmp_path: Path) -> None:
    from vllm.model_executor.models.gpt_oss import GptOssForCausalLM

    stored = load_file(recipe("small_model").build(tmp_path) / "model.safetensors")
    model = SimpleNamespace(
        packed_modules_mapping=GptOssForCausalLM.packed_modules_mapping,
        hf_to_vllm_mapper=GptOssForCausalLM.hf_to_vllm_mapper,
        config=SimpleNamespace(model_type="gpt_oss"),
        syncline_loaded=frozenset(stored),
    )
    names = CheckpointNames(model)
    for name in (name for name in stored if ".experts." not in name):
        own = name.replace("embed_tokens", "embedding").replace(".self_attn.", ".attn.")
        fused = own
        for part in ("q_proj", "k_proj", "v_proj"):
            fused = fused.replace(part, "qkv_proj")
        assert names.of(own, fused) == name


@pytest.mark.parametrize(
    "extra", [{"moe_backend": "triton"}, {"enable_mixed_moe_lora_format": True}, {"fully_sharded_loras": True}]
)
def test_options_under_which_experts_cannot_be_adapted_are_refused(tmp_path: Path, extra: dict[str, Any]) -> None:
    path = recipe("small_model").build(tmp_path / "model")
    values = run_values(path, tmp_path, bridge={"name": "lora"}, engine={"extra": extra})
    values["model"]["lora"] = {"rank": 4}
    config = resolve(values)
    assert stored_format(config) == "mxfp4"
    with pytest.raises(ConfigError, match=rf"engine\.extra\.{next(iter(extra))}"):
        _options(config, "cpu", Start(port=1))
