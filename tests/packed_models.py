"""Small random models whose linear layers are packed by each format's own formula, written here from the other side:
from plain weights to words."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from real_engine import make_tiny_model
from safetensors.torch import load_file, save_file
from torch import Tensor

GROUP = 64
HALF = torch.float16
_COMPRESSED = {"quant_method": "compressed-tensors", "quantization_status": "compressed", "ignore": ["lm_head"]}
_INTEGERS = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP}
_FLOATS = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel", "dynamic": False}
_TOKENS = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True}


def words(numbers: Tensor, dimension: int, order: tuple[int, ...] = tuple(range(8))) -> Tensor:
    """Eight neighbours of four bits a word, the one that `order` names first in the lowest bits."""
    eight = numbers.long().unflatten(dimension, (-1, 8))
    total = torch.stack([eight.select(dimension + 1, one) << 4 * place for place, one in enumerate(order)]).sum(0)
    return torch.where(total >= 1 << 31, total - (1 << 32), total).to(torch.int32)


def gptq(weight: Tensor) -> dict[str, Tensor]:
    """Symmetric, in groups of inputs: q = round(w / s) + 8."""
    groups = weight.T.unflatten(0, (-1, GROUP))
    scales = (groups.abs().amax(1) / 7).to(HALF)
    numbers = (groups / scales[:, None].float()).round().clamp(-8, 7).flatten(0, 1) + 8
    zeros = torch.full_like(scales, 7, dtype=torch.long)  # AutoGPTQ stores them less one
    order = torch.arange(len(numbers), dtype=torch.int32) // GROUP
    return {"qweight": words(numbers, 0), "qzeros": words(zeros, 1), "scales": scales, "g_idx": order}


def awq(weight: Tensor) -> dict[str, Tensor]:
    """With a zero point: q = round(w / s) + z."""
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    groups = weight.T.unflatten(0, (-1, GROUP))
    low, high = groups.amin(1).clamp(max=0), groups.amax(1).clamp(min=0)
    scales = ((high - low) / 15).to(HALF)
    zeros = (-low / scales.float()).round().clamp(0, 15)
    numbers = ((groups / scales[:, None].float()).round() + zeros[:, None]).clamp(0, 15).flatten(0, 1)
    return {"qweight": words(numbers, 1, order), "qzeros": words(zeros, 1, order), "scales": scales}


def compressed_integers(weight: Tensor) -> dict[str, Tensor]:
    groups = weight.unflatten(1, (-1, GROUP))
    scales = (groups.abs().amax(2) / 7).bfloat16()
    numbers = (groups / scales[:, :, None].float()).round().clamp(-8, 7).flatten(1, 2) + 8
    return {
        "weight_packed": words(numbers, 1),
        "weight_scale": scales,
        "weight_shape": torch.tensor(weight.shape),
    }


def compressed_floats(weight: Tensor) -> dict[str, Tensor]:
    scales = weight.abs().amax(1, keepdim=True) / 448
    return {"weight": (weight / scales).to(torch.float8_e4m3fn), "weight_scale": scales.bfloat16()}


def fp8(weight: Tensor, block: int = 128) -> dict[str, Tensor]:
    """The last blocks are cut where a size is no multiple of theirs."""
    rows, columns = (-(-size // block) for size in weight.shape)
    padded = torch.zeros(rows * block, columns * block)
    padded[: weight.shape[0], : weight.shape[1]] = weight
    blocks = padded.unflatten(1, (-1, block)).unflatten(0, (-1, block))
    scales = blocks.abs().amax((1, 3)) / 448
    values = (blocks / scales[:, None, :, None]).flatten(2, 3).flatten(0, 1)[: weight.shape[0], : weight.shape[1]]
    return {"weight": values.to(torch.float8_e4m3fn).contiguous(), "weight_scale_inv": scales}


def _group(weights: dict, **more: object) -> dict:
    return {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, **more}}}


SETTINGS: dict[str, tuple[Callable[[Tensor], dict[str, Tensor]], dict]] = {
    "gptq": (
        gptq,
        {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True, "lm_head": False},
    ),
    "awq": (
        awq,
        {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"},
    ),
    "w4a16": (compressed_integers, _COMPRESSED | {"format": "pack-quantized"} | _group(_INTEGERS)),
    "fp8-channel": (
        compressed_floats,
        _COMPRESSED | {"format": "float-quantized"} | _group(_FLOATS, input_activations=_TOKENS),
    ),
    "fp8": (fp8, {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}),
}


def make_packed_model(folder: Path, name: str, *, seed: int = 0, tied: bool = True) -> Path:
    """`make_tiny_model`'s with every projection packed by the format `name`."""
    pack, settings = SETTINGS[name]
    # of 256, keys and values are whole blocks of FP8 each; vLLM has no places for the scales of less
    make_tiny_model(folder, seed=seed, tied=tied, hidden_size=256 if name == "fp8" else 128)
    stored = {}
    for key, tensor in load_file(folder / "model.safetensors").items():
        layer, _, leaf = key.rpartition(".")
        if leaf == "weight" and layer.endswith("_proj"):
            stored |= {f"{layer}.{own}": t.contiguous() for own, t in pack(tensor.float()).items()}
        else:
            stored[key] = tensor
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    return folder
