"""Fused experts: vLLM's `w13_weight` [E, 2I, H] and `w2_weight` [E, H, I] are transformers' `experts.gate_up_proj` and
`experts.down_proj`, bit for bit, as long as the kernels read them as they were loaded.

The Triton kernels do. Others swap halves or permute blocks after loading, and are refused by name.
"""

from collections.abc import Iterator
from typing import Any

import torch

from syncline.bridges.manifest import Shard
from syncline.errors import SyncError

CHECKPOINT_LAYOUT = ("TRITON", "BATCHED_TRITON")


def expert_pieces(name: str, tensor: torch.Tensor, module: Any) -> Iterator[tuple[str, Shard]]:
    """One rank's pieces: the halves of `gate_up_proj` are split over ranks each on its own."""
    _refuse_other_layouts(name, tensor, module)
    *path, leaf = name.split(".")
    prefix = ".".join(part for part in path if part != "routed_experts")
    parallel = module.moe_config.moe_parallel_config
    rank, ranks = parallel.tp_rank, parallel.tp_size
    experts, rows, columns = tensor.shape
    if leaf == "w2_weight":
        yield f"{prefix}.down_proj", Shard(tensor, (experts, rows, columns * ranks), (0, 0, columns * rank))
    elif ranks == 1:
        yield f"{prefix}.gate_up_proj", Shard(tensor, (experts, rows, columns), (0, 0, 0))
    else:
        half = rows // 2
        for index, piece in enumerate(tensor.split(half, dim=1)):
            start = (index * ranks + rank) * half
            yield f"{prefix}.gate_up_proj", Shard(piece, (experts, rows * ranks, columns), (0, start, 0))


def _refuse_other_layouts(name: str, tensor: torch.Tensor, module: Any) -> None:
    config, leaf = module.moe_config, name.rpartition(".")[2]
    backend = getattr(getattr(module.quant_method, "unquantized_backend", None), "name", type(module.quant_method))
    intermediate, hidden = config.intermediate_size_per_partition_unpadded, config.hidden_dim_unpadded
    expected = {"w13_weight": (2 * intermediate, hidden), "w2_weight": (hidden, intermediate)}.get(leaf)
    if backend not in CHECKPOINT_LAYOUT:
        raise SyncError(
            f"{name}: vLLM repacks experts for its {backend} kernels; set engine.extra to {{moe_backend: triton}}"
        )
    if config.moe_parallel_config.use_ep or module.local_num_experts != module.global_num_experts:
        raise SyncError(f"{name}: experts lie on different ranks; leave engine.extra.enable_expert_parallel out")
    if expected != tuple(tensor.shape[1:]):
        raise SyncError(f"{name}: vLLM pads or changes experts of shape {expected} to {list(tensor.shape)}")
