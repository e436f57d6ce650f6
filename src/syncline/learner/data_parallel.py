"""FSDP2 (torch's `fully_shard`): ranks that see different tokens and keep a part of every parameter each.

A layer's parameters are gathered before it computes and freed after it; its gradient is summed over the ranks and left
in parts, on the parameters' own parts. Embedding, last norm and head are the root's, gathered for the whole of a
forward and backward pass: the head's weight is used tile by tile, not by calling the head. The loss's normalisers count
the tokens of all ranks, so gradients are summed, never averaged.

Who waits for whom: every rank, for all others, at each layer. So all must compute as many micro-batches; one that has
none left computes an idle one (`PackedBatch.idle`).
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from syncline.bridges.ranks import DATA_PARALLEL, Ranks
from syncline.learner.layers import decoder_layers

T = TypeVar("T")


def shard_over(root: Any, ranks: Ranks, *, sum_in: torch.dtype | None) -> None:
    """Leaves this rank's parts in the model, in place, on the ranks' device. Nothing is sent: every rank read the same
    checkpoint. `root` holds every parameter; `sum_in` is the type gradients are summed in, by default their own.

    Raises `ConfigError` for a model in which transformers marks no layers.
    """
    if ranks.mesh is None:
        return
    how: dict[str, Any] = {"mesh": ranks.mesh[DATA_PARALLEL], "mp_policy": MixedPrecisionPolicy(reduce_dtype=sum_in)}
    for layer in decoder_layers(root):
        fully_shard(layer, **how)
    fully_shard(root, **how)
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo knows no scaled sum
    root.with_root_gathered = lambda compute: compute()
    register_fsdp_forward_method(root, "with_root_gathered")


def with_parameters(root: Any, compute: Callable[[], T]) -> T:
    """`compute()`, which applies `root`'s modules; of a sharded model as FSDP's forward pass.

    The outputs, a tensor or a tuple of them, carry the hooks of its backward pass.
    """
    if not isinstance(root, FSDPModule):
        return compute()
    outputs = root.with_root_gathered(compute)  # pyright: ignore[reportAttributeAccessIssue]
    if not torch.is_grad_enabled():
        root.reshard()  # no backward pass will
    return outputs


def in_parts(root: nn.Module) -> None:
    """What an earlier forward pass left gathered is freed, and the module's parameters are this rank's parts again."""
    if isinstance(root, FSDPModule):
        root.reshard()
