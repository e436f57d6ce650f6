"""Packed linear layers: the formats' formulas by hand, beside other libraries', and proved to be the checkpoint's."""

from pathlib import Path
from typing import Any

import pytest
import torch
from packed_models import SETTINGS, make_packed_model
from safetensors.torch import load_file, save_file

from syncline.bridges.receipt import parameter_digests
from syncline.config.schema import Lora, Model
from syncline.errors import ConfigError, SyncError
from syncline.learner.adapter import base_parameters, frozen_base
from syncline.learner.model import load_model
from syncline.learner.packed import _values, integers, stored_layers

CPU = torch.device("cpu")
UP = torch.tensor([[0x76543210]], dtype=torch.int32)
"""0 to 7, the lowest bits first."""
NAME = "model.layers.1.mlp.down_proj"


def word(value: int) -> torch.Tensor:
    return torch.tensor([[value - (1 << 32) if value >> 31 else value]], dtype=torch.int32)


def weight(method: str, layer: dict[str, torch.Tensor], **settings: Any) -> list[list[float]]:
    return _values(layer, {"quant_method": method} | settings, torch.bfloat16)["weight"].tolist()


def test_gptq_packs_inputs_around_the_middle() -> None:
    layer = {
        "qweight": UP.repeat(1, 8),  # eight inputs, eight outputs
        "qzeros": word(0x77777777),  # stored less one
        "scales": torch.full((1, 8), 0.5, dtype=torch.float16),
    }
    rows = weight("gptq", layer, bits=4)
    assert rows == [[-4.0, -3.5, -3.0, -2.5, -2.0, -1.5, -1.0, -0.5]] * 8
    second = layer | {"qzeros": word(0x88888888)}
    assert weight("gptq", second, bits=4, checkpoint_format="gptq_v2") == rows


@pytest.mark.parametrize(
    "change",
    [{"qzeros": word(0x77777776)}, {"g_idx": torch.tensor([0, 0, 0, 0, 1, 0, 0, 0])}],
    ids=["zeros", "order"],
)
def test_gptq_of_which_vllm_would_leave_something_out_is_refused(change: dict[str, torch.Tensor]) -> None:
    layer = {"qweight": UP.repeat(1, 8), "qzeros": word(0x77777777), "scales": torch.ones(1, 8).half()}
    with pytest.raises(ConfigError, match="qzeros or g_idx are not those of symmetric GPTQ in order"):
        weight("gptq", layer | change, bits=4)


def test_awq_packs_outputs_in_an_order_of_its_own_around_zeros_of_their_own() -> None:
    layer = {"qweight": UP, "qzeros": word(0x11111111), "scales": torch.full((1, 8), 2.0, dtype=torch.float16)}
    assert weight("awq", layer, bits=4) == [[2.0 * (q - 1)] for q in (0, 4, 1, 5, 2, 6, 3, 7)]
    highest = integers(word(0xF0000000), 4, packed=1)
    assert highest.tolist() == [[0] * 7 + [15]], "a word's sign is a bit like any other"


def test_compressed_integers_are_offset_and_may_end_inside_a_word() -> None:
    settings = {"config_groups": {"group_0": {"weights": {"num_bits": 4}}}}
    layer = {
        "weight_packed": UP,
        "weight_scale": torch.tensor([[1.0, 10.0]]).bfloat16(),
        "weight_shape": torch.tensor([1, 6]),
    }
    assert weight("compressed-tensors", layer, **settings) == [[-8.0, -7.0, -6.0, -50.0, -40.0, -30.0]]


def test_fp8_has_a_scale_for_each_block_of_which_the_last_may_be_cut() -> None:
    ones = torch.ones(3, 3).to(torch.float8_e4m3fn)
    scales = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    rows = weight("fp8", {"weight": ones, "weight_scale_inv": scales}, weight_block_size=[2, 2])
    assert rows == [[1.0, 1.0, 2.0], [1.0, 1.0, 2.0], [3.0, 3.0, 4.0]]


def load(path: Path, lora: Lora | None = None) -> Any:
    return load_model(Model(path=str(path), dtype="bfloat16", lora=lora), device=CPU)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("packed")
    return {name: make_packed_model(folder / name, name) for name in SETTINGS}


@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_the_model_has_the_values_that_were_packed(models: dict[str, Path], name: str) -> None:
    """Against the weights that `make_packed_model` rounded; the error of four bits, or of three of a mantissa."""
    model = load(models[name])
    plain = make_plain(models[name])
    assert getattr(model.config, "quantization_config", None) is None
    for key, parameter in model.named_parameters():
        expected = plain[key].float()
        error = (parameter.detach().float() - expected).norm() / expected.norm()
        assert error < (0.15 if key.endswith("_proj.weight") else 0.003), key


def make_plain(path: Path) -> dict[str, torch.Tensor]:
    from real_engine import make_tiny_model

    return load_file(make_tiny_model(path.parent / "plain") / "model.safetensors")


@pytest.mark.parametrize("name", ["w4a16", "fp8-channel", "fp8"])
def test_transformers_own_dequantisation_gives_the_same_values(models: dict[str, Path], name: str) -> None:
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig, FineGrainedFP8Config

    config: Any = FineGrainedFP8Config if name == "fp8" else CompressedTensorsConfig
    theirs = AutoModelForCausalLM.from_pretrained(
        models[name], dtype=torch.bfloat16, quantization_config=config(dequantize=True)
    )
    for key, parameter in load(models[name]).named_parameters():
        torch.testing.assert_close(parameter, theirs.get_parameter(key), rtol=2**-7, atol=0.0)


@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_the_learners_values_are_proved_to_be_the_checkpoints(models: dict[str, Path], name: str) -> None:
    """All that the checkpoint has of packed layers, biases too; the rest is measured in memory."""
    model = load(models[name], Lora(rank=4))
    plain, stored = frozen_base(models[name])
    tensors = load_file(models[name] / "model.safetensors")
    expected = {key: tensor for key, tensor in tensors.items() if "_proj." in key}
    assert stored(model) == parameter_digests(expected.items())
    assert {key for key, _ in plain(model)} == tensors.keys() - expected.keys()


@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_a_value_that_is_not_the_checkpoints_is_named(models: dict[str, Path], name: str, tmp_path: Path) -> None:
    base = dict(base_parameters(load(models[name])))
    tensors = load_file(models[name] / "model.safetensors")
    scales = next(key for key in tensors if key.startswith(NAME) and "scale" in key)
    tensors[scales][-1] *= 1.5
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((models[name] / "config.json").read_bytes())
    with pytest.raises(SyncError, match=rf"^{NAME}\.weight: the learner's values are not those of the packed layer"):
        stored_layers(base.items(), tmp_path)


def test_a_packed_layer_that_the_learner_lacks_is_named(models: dict[str, Path]) -> None:
    base = [(key, p) for key, p in base_parameters(load(models["gptq"])) if not key.startswith(NAME)]
    with pytest.raises(SyncError, match=rf"^{NAME}: packed in .*, and the learner's model has no such layer"):
        stored_layers(base, models["gptq"])


def test_packed_experts_are_refused(models: dict[str, Path], tmp_path: Path) -> None:
    tensors = load_file(models["awq"] / "model.safetensors")
    tensors = {key.replace("mlp.", "mlp.experts.0."): tensor for key, tensor in tensors.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((models["awq"] / "config.json").read_bytes())
    with pytest.raises(ConfigError, match=r"experts\.0\.down_proj is packed, and of experts the learner reads MXFP4"):
        load(tmp_path)
