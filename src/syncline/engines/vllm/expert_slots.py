"""Slots for adapters of fused experts, whose two matrices vLLM keeps for all experts of a layer: `w13` and `w2`.

A rank holds of `gate_up_proj` the rows of its experts' part (gate and up rows take turns, so they are neighbours), of
`down_proj` the columns; what their kernels pad lies beside. vLLM cuts an adapter at the padded size and the experts at
their own, so on several ranks padded experts would be adapted at the wrong rows: that is refused.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from syncline.bridges.manifest import Shard
from syncline.errors import SyncError

MATRICES = ("gate_up_proj", "down_proj")
Stack = tuple[torch.Tensor, torch.Tensor]


def stacks(module: Any) -> list[Stack]:
    """A and B of every slice of a layer, all slots of each."""
    if hasattr(module, "w13_lora_a_stacked"):
        pairs = [(module.w13_lora_a_stacked, module.w13_lora_b_stacked)]
        pairs.append((module.w2_lora_a_stacked, module.w2_lora_b_stacked))
        return [one for a, b in pairs for one in zip(a, b, strict=True)]
    a, b = ([one] if isinstance(one, torch.Tensor) else one for one in (module.lora_a_stacked, module.lora_b_stacked))
    return list(zip(a, b, strict=True))


def adapted_experts(name: str, layer: Any) -> dict[str, "AdaptedExperts"]:
    """Both matrices of a layer of experts that vLLM adapts as PEFT does: one pair a matrix, gate and up in one."""
    from vllm.lora.layers import FusedMoE3DWithLoRA

    if not isinstance(layer, FusedMoE3DWithLoRA):
        return {}
    return {f"{name}.{matrix}": AdaptedExperts(name, layer, i) for i, matrix in enumerate(MATRICES)}


@dataclass(frozen=True, slots=True)
class AdaptedExperts:
    """One matrix of all experts. `index` is into `MATRICES`."""

    name: str
    """vLLM's, of the layer."""
    layer: Any
    index: int

    @property
    def size(self) -> list[int]:
        """Experts, inputs and outputs of the whole."""
        hidden, inner = self._hidden, self._inner * self.layer.tp_size
        experts = self.layer.moe_config.num_experts
        return [experts, hidden, 2 * inner] if self.index == 0 else [experts, inner, hidden]

    def a(self, slot: int, rank: int) -> Shard:
        """This worker's piece of `A [experts, rank, inputs]`."""
        self._refuse_other_cuts()
        experts, inputs, _ = self.size
        start = 0 if self.index == 0 else self.layer.tp_rank * self._inner
        held = self._stack[0][slot, :, :rank, : self._inputs]
        return self._shard(held, (experts, rank, inputs), (0, 0, start))

    def b(self, slot: int, rank: int) -> Iterator[Shard]:
        """This worker's piece of `B [experts, outputs, rank]`."""
        experts, _, outputs = self.size
        start = self.layer.tp_rank * 2 * self._inner if self.index == 0 else 0
        held = self._stack[1][slot, :, : self._outputs, :rank]
        yield self._shard(held, (experts, outputs, rank), (0, start, 0))

    def beside(self, slot: int, rank: int) -> Iterator[torch.Tensor]:
        """What of the slot is no part of an adapter of this rank."""
        a, b = (one[slot] for one in self._stack)
        yield from (a[:, rank:], a[:, :rank, self._inputs :], b[..., rank:], b[:, self._outputs :, :rank])

    @property
    def _stack(self) -> Stack:
        return stacks(self.layer)[self.index]

    @property
    def _hidden(self) -> int:
        return self.layer.moe_config.hidden_dim_unpadded

    @property
    def _inner(self) -> int:
        """Of this rank's part of the experts."""
        return self.layer.moe_config.intermediate_size_per_partition_unpadded

    @property
    def _inputs(self) -> int:
        return self._hidden if self.index == 0 else self._inner

    @property
    def _outputs(self) -> int:
        return 2 * self._inner if self.index == 0 else self._hidden

    def _refuse_other_cuts(self) -> None:
        config, layer = self.layer.moe_config, self.layer
        if layer.local_num_experts != config.num_experts:
            raise SyncError(
                f"{self.name}: experts lie on different ranks; leave engine.extra.enable_expert_parallel out"
            )
        if layer.fully_sharded:
            raise SyncError(f"{self.name}: leave engine.extra.fully_sharded_loras out")
        if layer.tp_size > 1 and layer.intermediate_size_per_partition != self._inner:
            raise SyncError(
                f"{self.name}: vLLM pads a rank's {self._inner} columns of the experts to "
                f"{layer.intermediate_size_per_partition}, and would cut their adapters there; set "
                "engine.tensor_parallel_size to 1, and engine.num_replicas higher"
            )

    def _shard(self, tensor: torch.Tensor, shape: tuple[int, ...], start: tuple[int, ...]) -> Shard:
        is_whole = tuple(tensor.shape) == shape
        return Shard(tensor, shape, start, self.layer.tp_rank == 0 if is_whole else True)
