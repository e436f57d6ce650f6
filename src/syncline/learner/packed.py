"""A base whose linear layers a checkpoint holds packed: the learner computes with the values they stand for.

The engine keeps a packing of its kernels' own, and its kernels compute with the same values, in the model's type. What
both sides can tell is what they were given: `stored_layers` proves that the learner's values are those of the
checkpoint's tensors, and gives the digests of those, which the engine took of what it loaded.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from syncline.bridges.receipt import parameter_digests
from syncline.bridges.repacked import packed_layers
from syncline.config.model_folder import MXFP4
from syncline.errors import ConfigError, SyncError
from syncline.learner.mxfp4 import is_expert, opened

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight neighbours lies at which four bits of a word, the lowest first."""
_BITS = 32
Layer = Mapping[str, Tensor]
"""A layer's tensors in the checkpoint, by their last name."""
Settings = Mapping[str, Any]
"""`quantization_config`."""


def settings_of(config: Any) -> dict[str, Any] | None:
    """Of a model's configuration; `None`: its linear layers are plain."""
    found = getattr(config, "quantization_config", None)
    values = found if found is None or isinstance(found, dict) else found.to_dict()
    return None if not values or values["quant_method"] == MXFP4 else values


def unpacked_model(config: Any, folder: Path, *, dtype: torch.dtype, **options: Any) -> Any:
    """The model of a checkpoint with packed layers, every one of them plain and in `dtype`, as is then its
    configuration. `options` are those of `from_pretrained`.

    Raises `ConfigError` for a packing that nobody here reads.
    """
    import transformers

    settings = settings_of(config) or {}
    del config.quantization_config
    with ExitStack() as files:
        stored = opened(folder, files)
        layers = packed_layers(stored)
        if experts := sorted(filter(is_expert, layers)):
            raise ConfigError([f"model.path: {experts[0]} is packed, and of experts the learner reads MXFP4 alone"])
        state = {name: file.get_tensor(name) for name, file in stored.items() if _parent(name) not in layers}
        for layer in layers:
            state |= {f"{layer}.{leaf}": t for leaf, t in _values(_read(stored, layer), settings, dtype).items()}
    family: Any = getattr(transformers, config.architectures[0])
    return family.from_pretrained(None, config=config, state_dict=state, dtype=dtype, **options)


def stored_layers(base: Iterable[tuple[str, Tensor]], folder: Path) -> dict[str, str]:
    """Name → digest of every tensor that the checkpoint has of its packed layers. `base` are the learner's parameters.

    Raises `SyncError` naming a parameter whose values in memory are not those of the checkpoint.
    """
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    found: dict[str, str] = {}
    with ExitStack() as files:
        stored = opened(folder, files)
        missing = set(packed_layers(stored))
        for name, parameter in base:
            layer, _, leaf = name.rpartition(".")
            if layer not in missing or leaf != "weight":
                continue
            missing.remove(layer)
            tensors = {leaf: tensor.to(parameter.device) for leaf, tensor in _read(stored, layer).items()}
            if not torch.equal(_values(tensors, settings, parameter.dtype)["weight"], parameter):
                raise SyncError(f"{name}: the learner's values are not those of the packed layer in {folder}")
            found |= parameter_digests((f"{layer}.{leaf}", tensor) for leaf, tensor in tensors.items())
    if missing:
        raise SyncError(f"{min(missing)}: packed in {folder}, and the learner's model has no such layer")
    return found


def names_of_packed(folder: Path) -> frozenset[str]:
    """Layers that the checkpoint holds packed."""
    with ExitStack() as files:
        return packed_layers(opened(folder, files))


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _read(stored: Mapping[str, Any], layer: str) -> dict[str, Tensor]:
    own = (name for name in stored if _parent(name) == layer)
    return {name.rpartition(".")[2]: stored[name].get_tensor(name) for name in own}


def _values(layer: Layer, settings: Settings, dtype: torch.dtype) -> dict[str, Tensor]:
    """The layer's weight `[outputs, inputs]`, and its bias if it has one."""
    found = {"weight": _FORMATS[settings["quant_method"]](layer, settings, dtype)}
    return found | ({"bias": layer["bias"].to(dtype)} if "bias" in layer else {})


def _gptq(layer: Layer, settings: Settings, dtype: torch.dtype) -> Tensor:
    """w = (q − 2^(b−1)) · s: AutoGPTQ's layout of GPTQ (Frantar et al. 2022), symmetric: `qweight [K·b/32, N]` packs
    inputs, `scales [K/g, N]`. vLLM reads neither zeros nor the order of inputs, so they have to say nothing."""
    bits, scales = settings["bits"], layer["scales"]
    middle = 1 << (bits - 1)
    zeros = integers(layer["qzeros"], bits, packed=1) + (settings.get("checkpoint_format", "gptq") == "gptq")
    weight = integers(layer["qweight"], bits, packed=0)
    groups = torch.arange(len(weight), device=weight.device) // (len(weight) // len(scales))
    if bool((zeros != middle).any()) or not torch.equal(layer.get("g_idx", groups).long(), groups):
        fault = (
            "has layers whose qzeros or g_idx are not those of symmetric GPTQ in order, which is all that vLLM reads"
        )
        raise ConfigError([f"model.path: {fault}; quantise it with sym and without desc_act"])
    return _scaled(weight - middle, scales, dtype).T.contiguous()


def _awq(layer: Layer, settings: Settings, dtype: torch.dtype) -> Tensor:
    """w = (q − z) · s: AutoAWQ's GEMM layout (Lin et al. 2023): `qweight [K, N·b/32]` packs outputs, in an order of its
    own, `qzeros [K/g, N·b/32]` alike, `scales [K/g, N]`."""
    bits = settings["bits"]
    weight, zeros = (integers(layer[name], bits, packed=1, order=AWQ_ORDER) for name in ("qweight", "qzeros"))
    return _scaled(weight - _spread(zeros, weight), layer["scales"], dtype).T.contiguous()


def _compressed(layer: Layer, settings: Settings, dtype: torch.dtype) -> Tensor:
    """w = q · s: compressed-tensors' `float-quantized` (`weight [N, K]`), or `pack-quantized` (`weight_packed
    [N, K·b/32]`, symmetric, offset by 2^(b−1)); a scale for each row, or for each group of columns of it."""
    if "weight_packed" not in layer:
        return _scaled(layer["weight"], layer["weight_scale"], dtype)
    [group] = settings["config_groups"].values()
    bits, columns = group["weights"]["num_bits"], int(layer["weight_shape"][1])
    weight = integers(layer["weight_packed"], bits, packed=1)[:, :columns] - (1 << (bits - 1))
    return _scaled(weight, layer["weight_scale"], dtype)


def _fp8(layer: Layer, settings: Settings, dtype: torch.dtype) -> Tensor:
    """w = q · s: E4M3 with a scale for each block (DeepSeek-AI 2024, "DeepSeek-V3", §3.3.2)."""
    return _scaled(layer["weight"], layer["weight_scale_inv"], dtype, block=settings["weight_block_size"])


_FORMATS: Mapping[str, Callable[[Layer, Settings, torch.dtype], Tensor]] = {
    "gptq": _gptq,
    "awq": _awq,
    "fp8": _fp8,
    "compressed-tensors": _compressed,
}


def integers(words: Tensor, bits: int, *, packed: int, order: Sequence[int] = ()) -> Tensor:
    """Numbers of `bits` bits out of 32-bit words, along the dimension `packed` of a matrix. The lowest bits are the
    first number's; with `order` they are of the neighbour that comes first in it."""
    shifts = torch.arange(0, _BITS, bits, device=words.device)
    if order:
        shifts = shifts[torch.tensor(order).argsort()]
    parts = [(words >> shift) & ((1 << bits) - 1) for shift in shifts]
    return torch.stack(parts, dim=packed + 1).flatten(packed, packed + 1)


def _scaled(values: Tensor, scales: Tensor, dtype: torch.dtype, block: Sequence[int] = ()) -> Tensor:
    """Rounded once. Engines hold the scales of integers in the model's own type."""
    scales = scales if values.dtype.is_floating_point else scales.to(dtype)
    return (values.float() * _spread(scales, values, block).float()).to(dtype)


def _spread(coarse: Tensor, fine: Tensor, block: Sequence[int] = ()) -> Tensor:
    """A number for each block of a matrix → one for each of its elements; the last blocks may be cut."""
    for dimension, size in enumerate(block or (-(-f // c) for f, c in zip(fine.shape, coarse.shape, strict=True))):
        coarse = coarse.repeat_interleave(size, dimension).narrow(dimension, 0, fine.shape[dimension])
    return coarse
