"""What a folder holds against what an engine says it holds: names of the memory, whatever the files call them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from model_families import EXPERT, save_random_model
from real_engine import make_tiny_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from syncline.bridges.receipt import parameter_digests
from syncline.bridges.repacked import PREFIX
from syncline.bridges.verify import faults_of
from syncline.errors import CheckpointError


def served(folder: Path, dtype: torch.dtype = torch.float32) -> dict[str, str]:
    """What an engine that loaded this folder answers, under the names of the learner's memory."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return parameter_digests(model.named_parameters())


def changed(folder: Path, name: str) -> None:
    """One element of one tensor, in the file that holds it."""
    for path in folder.glob("*.safetensors"):
        tensors: Mapping[str, torch.Tensor] = load_file(path)
        if name in tensors:
            tensors[name].view(-1)[3] += 1
            save_file(dict(tensors), path, metadata={"format": "pt"})
            return
    raise AssertionError(f"{name} is in no file")


@pytest.mark.parametrize(
    ("family", "in_files", "in_memory"),
    [
        ("mixtral", "model.layers.1.block_sparse_moe.experts.2.w3.weight", "model.layers.1.mlp.experts.gate_up_proj"),
        ("qwen3-moe", "model.layers.0.mlp.experts.1.down_proj.weight", "model.layers.0.mlp.experts.down_proj"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_are_compared_under_the_names_of_the_memory(
    family: str, in_files: str, in_memory: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    folder = save_random_model(family, tmp_path)
    held = served(folder, dtype)
    assert in_memory in held
    assert faults_of(folder, held) == []
    changed(folder, in_files)
    [fault] = faults_of(folder, held)
    assert fault.startswith(f"{in_memory}: the checkpoint {str(dtype).removeprefix('torch.')}[4, ")


@pytest.mark.parametrize("family", EXPERT)
def test_every_family_of_experts_that_is_promised_can_be_verified(family: str, tmp_path: Path) -> None:
    folder = save_random_model(family, tmp_path)
    assert faults_of(folder, served(folder)) == []


def test_an_expert_that_the_files_lack_is_named(tmp_path: Path) -> None:
    folder = save_random_model("mixtral", tmp_path)
    held = served(folder)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for name in [name for name in tensors if "layers.1.block_sparse_moe.experts" in name and ".w2." in name]:
        del tensors[name]
    save_file(tensors, path, metadata={"format": "pt"})
    assert faults_of(folder, held) == ["model.layers.1.mlp.experts.down_proj: not in the checkpoint"]


def test_what_lies_beside_the_weights_is_not_compared(tmp_path: Path) -> None:
    """A run's checkpoint keeps the optimizer's moments in the same folder."""
    folder = make_tiny_model(tmp_path)
    save_file({"model.norm.weight.first": torch.ones(3)}, folder / "optimizer.safetensors")
    assert faults_of(folder, served(folder)) == []


def test_a_tied_head_that_files_repeat_is_the_embedding(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path)
    held = served(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"]
    assert faults_of(folder, held) == []


def test_what_an_engine_packed_again_is_beside_what_it_was_handed(tmp_path: Path) -> None:
    """Of a quantised base it tells both; the checkpoint has the one."""
    folder = make_tiny_model(tmp_path)
    again = {f"{PREFIX}model.layers.0.mlp.down_proj.qweight": "int32[1]:0"}
    assert faults_of(folder, served(folder) | again) == []


def test_a_folder_without_weights_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no model\*\.safetensors; give the folder of a checkpoint"):
        faults_of(tmp_path, {})


@pytest.mark.parametrize("text", ["", "[]", '{"r": "4"}', '{"r": 0, "lora_alpha": 8, "base_model_name_or_path": null}'])
def test_settings_of_an_adapter_that_are_none_are_told(tmp_path: Path, text: str) -> None:
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(CheckpointError, match=f"{tmp_path}: adapter_config.json is not what PEFT writes"):
        faults_of(tmp_path, {})
