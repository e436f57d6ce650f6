"""An adapter's tensors as PEFT names and shapes them in a file: of fused experts two long matrices, under its wrappers.

PEFT wraps a module once for each parameter it adapts, the first innermost, so of experts `gate_up_proj` has the name of
the inner wrapper and `down_proj` that of the outer one. A [E, r, in] is written as [E·r, in], B [E, out, r] as
[out, r·E].
"""

import torch

from syncline.bridges.adapter import A

PREFIX = "base_model.model."
_INNER, _OUTER = ".gate_up_proj", ".down_proj"


def file_name(name: str, num_dimensions: int) -> str:
    if num_dimensions == 2:
        return PREFIX + name
    module, _, end = name.rpartition(".lora_")
    wrapper = f"{module.removesuffix(_INNER)}.base_layer" if module.endswith(_INNER) else module.removesuffix(_OUTER)
    return f"{PREFIX}{wrapper}.lora_{end}"


def to_file(name: str, tensor: torch.Tensor) -> torch.Tensor:
    if tensor.dim() == 2:
        return tensor
    return tensor.flatten(0, 1) if name.endswith(A) else tensor.permute(1, 2, 0).flatten(1)


def from_file(name: str, tensor: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """The other way, to a tensor of `shape`, if it has as many elements."""
    if len(shape) == 2 or tensor.numel() != shape.numel():
        return tensor
    return tensor.reshape(shape) if name.endswith(A) else tensor.reshape(shape[1], shape[2], shape[0]).permute(2, 0, 1)
