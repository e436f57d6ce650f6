"""Linear layers that a checkpoint holds packed (GPTQ, AWQ, FP8): measured in the packing that vLLM's kernels read.

vLLM repacks them once they are loaded, fused as its layers are, and may put their biases in its kernels' order too. So
all that such a layer holds is measured as bytes; where it comes from is shown by what the loader was handed
(`packed_experts.witnessed`).
"""

from collections.abc import Iterator
from typing import Any

import torch

from syncline.bridges.manifest import Shard
from syncline.bridges.repacked import PREFIX
from syncline.errors import SyncError

_WEIGHTS = ("qweight", "weight_packed", "weight")


def is_packed_layer(module: Any) -> bool:
    """Of any module of vLLM's."""
    from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod

    return isinstance(module, LinearBase) and not isinstance(module.quant_method, UnquantizedLinearMethod | None)


def packed_layer_pieces(name: str, tensor: torch.Tensor, module: Any) -> Iterator[tuple[str, Shard]]:
    """This rank's bytes of a parameter. Raises `SyncError` where the kernels keep the weights elsewhere."""
    held = dict(module.named_parameters(recurse=False))
    if not any(held[weight].numel() for weight in _WEIGHTS if weight in held):
        raise SyncError(
            f"{name}: vLLM's {type(module.quant_method).__name__} keeps the weights where nobody can measure them; "
            "give the model it was made from"
        )
    yield side_by_side(name, tensor, rank=module.tp_rank, ranks=module.tp_size)


def side_by_side(name: str, tensor: torch.Tensor, *, rank: int, ranks: int) -> tuple[str, Shard]:
    """A rank's bytes; no two ranks' are pieces of one tensor, so they are laid beside each other."""
    if not tensor.is_contiguous():
        tensor = tensor.t() if tensor.dim() == 2 and tensor.t().is_contiguous() else tensor.contiguous()
    bytes_ = (tensor if tensor.dim() else tensor[None]).view(torch.uint8)[None]
    shape = (ranks, *bytes_.shape[1:])
    return f"{PREFIX}{name}", Shard(bytes_, shape, (rank, *(0 for _ in shape[1:])))
