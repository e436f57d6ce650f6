"""What a packed checkpoint may be used with, read off its config.json."""

import json
from pathlib import Path
from typing import Any

import pytest
from packed_models import SETTINGS

from syncline.config import load
from syncline.config.model_folder import packed_faults, quantisation

TEXT = """
run: {dir: runs/x, num_steps: 10, groups_per_step: 4}
model: {path: x, max_length: 128, dtype: bfloat16, lora: {rank: 4}}
sampling: {max_tokens: 16}
environments: [{task: arithmetic}]
bridge: {name: lora}
engine: {device: cpu}
learner: {token_budget: 512, device: cpu}
"""
PACKED = {name: settings for name, (_, settings) in SETTINGS.items()}


def faults(folder: Path, settings: dict[str, Any], *overrides: str) -> list[str]:
    (folder / "config.json").write_text(json.dumps({"quantization_config": settings}))
    (folder / "run.yaml").write_text(TEXT)
    return packed_faults(load(folder / "run.yaml", [f"model.path={folder}", *overrides]))


@pytest.mark.parametrize("name", sorted(PACKED.keys() - {"fp8"}))
def test_an_adapter_over_a_packed_base_is_what_it_can_be_used_with(tmp_path: Path, name: str) -> None:
    assert faults(tmp_path, PACKED[name]) == []
    assert quantisation(str(tmp_path)) == PACKED[name]["quant_method"]


@pytest.mark.parametrize("name", ["gptq", "awq", "w4a16", "fp8-channel"])
@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (["bridge.name=restart"], "bridge.name: 'restart' would write weights into a base of "),
        (["bridge.name=broadcast"], "set model.lora, and bridge.name to lora, which moves the adapter alone"),
        (["bridge.name=shared"], "bridge.name: 'shared' would write weights"),
        (["bridge.name=restart", "model.lora=null"], "bridge.name: 'restart' would write weights"),
        (["model.dtype=float32"], "model.dtype: 'float32' may be float32, and vLLM computes "),
        (["learner.data_parallel_size=2"], "learner.data_parallel_size: 2 leaves a rank a part of the weights"),
    ],
)
def test_anything_else_names_the_bridge_that_can(tmp_path: Path, name: str, change: list[str], fault: str) -> None:
    [found] = faults(tmp_path, PACKED[name], *change)
    assert fault in found
    assert PACKED[name]["quant_method"] in found


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("gptq", {"desc_act": True}, "with desc_act, and vLLM takes no groups whose inputs are reordered"),
        ("gptq", {"sym": False}, "with sym = false"),
        ("gptq", {"bits": 8}, "with bits = 8, and vLLM's kernels take 4, on a GPU 8 too"),
        ("gptq", {"bits": 3}, "with bits = 3"),
        ("gptq", {"lm_head": True}, "its output layer too"),
        ("gptq", {"dynamic": {"+:.*": {"bits": 8}}}, "(dynamic)"),
        ("awq", {"version": "gemv"}, "in the layout gemm"),
        ("awq", {"zero_point": False}, "four bits with zero points"),
        ("fp8", {}, "by blocks, whose weights vLLM's kernels for them may quantise again"),
        ("fp8", {"weight_block_size": None}, "with one scale a layer, and vLLM quantises layers that it fuses again"),
        ("w4a16", {"format": "marlin-24"}, "one group of float-quantized by channel, or of pack-quantized"),
        ("w4a16", {"config_groups": {}}, "one group of"),
        ("w4a16", {"kv_cache_scheme": {"num_bits": 8, "type": "float"}}, "its KV cache too"),
        ("fp8", {"quant_method": "bitsandbytes"}, "no bridge has been shown to prove such a base"),
    ],
)
def test_a_packing_under_which_values_would_differ_is_refused_with_the_reason(
    tmp_path: Path, name: str, change: dict[str, Any], reason: str
) -> None:
    [fault] = faults(tmp_path, PACKED[name] | change)
    assert fault.startswith(f"model.path: '{tmp_path}' is quantised by ")
    assert reason in fault
    assert fault.endswith("give the model it was made from, or one packed otherwise")


def test_reordered_inputs_of_one_group_are_no_reordering(tmp_path: Path) -> None:
    assert faults(tmp_path, PACKED["gptq"] | {"desc_act": True, "group_size": -1}) == []


def test_layers_left_out_are_no_settings_of_their_own(tmp_path: Path) -> None:
    assert faults(tmp_path, PACKED["gptq"] | {"dynamic": {"-:.*down_proj": {}}}) == []
