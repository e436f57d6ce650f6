"""Which pieces of an adapter a rank's slot holds: vLLM cuts A and B as it cuts the layer they adapt.

A layer split by columns holds rows of B, one split by rows holds columns of A; the other matrix is whole on every rank.
With `fully_sharded_loras` that one is cut too, by its rows, which shows in the size of the slot. Fused experts are in
`expert_slots`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from syncline.bridges.manifest import Shard
from syncline.engines.vllm.expert_slots import AdaptedExperts, adapted_experts
from syncline.engines.vllm.layout import Part, row_parts
from syncline.engines.vllm.names import CheckpointNames


@dataclass(frozen=True, slots=True)
class AdaptedSlice:
    """One linear layer of the checkpoint, as one of the slices that a layer of vLLM's fuses."""

    name: str
    """vLLM's."""
    layer: Any
    index: int
    parts: tuple[Part, ...]
    """The rows of its matrix that this rank holds: several pieces where the checkpoint itself fuses matrices."""

    @property
    def num_inputs(self) -> int:
        return self.layer.base_layer.input_size

    @property
    def num_outputs(self) -> int:
        return sum(part.total_rows for part in self.parts)

    @property
    def size(self) -> list[int]:
        """Inputs and outputs of the whole."""
        return [self.num_inputs, self.num_outputs]

    def a(self, slot: int, rank: int) -> Shard:
        """This worker's piece of `A [rank, inputs]`."""
        held = self.layer.lora_a_stacked[self.index][slot, 0]
        max_rank, tp_rank = self.layer.lora_b_stacked[self.index].shape[3], self.layer.base_layer.tp_rank
        num_rows, num_columns = held.shape
        first_row = min(rank, tp_rank * num_rows if num_rows < max_rank else 0)
        first_column = tp_rank * num_columns if num_columns < self.num_inputs else 0
        return _shard(held[: min(rank - first_row, num_rows)], (rank, self.num_inputs), (first_row, first_column))

    def b(self, slot: int, rank: int) -> Iterator[Shard]:
        """This worker's pieces of `B [outputs, rank]`."""
        held = self.layer.lora_b_stacked[self.index][slot, 0, :, :rank]
        above = 0
        for rows, part in zip(held.split([part.num_rows for part in self.parts]), self.parts, strict=True):
            yield _shard(rows, (self.num_outputs, rank), (above + part.start, 0), counted=part.counted)
            above += part.total_rows

    def beside(self, slot: int, rank: int) -> Iterator[torch.Tensor]:
        """What of the slot is no part of an adapter of this rank."""
        yield self.layer.lora_a_stacked[self.index][slot, 0, len(self.a(slot, rank).tensor) :]
        yield self.layer.lora_b_stacked[self.index][slot, 0, :, rank:]


Layers = dict[str, AdaptedSlice | AdaptedExperts]
"""By the checkpoint's name of each linear layer, and of each fused parameter of experts, that can be adapted."""


def adaptable(manager: Any) -> Layers:
    """What of vLLM's model the bridge can adapt; anything else is left to be refused by name."""
    from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA

    known = CheckpointNames(getattr(manager, "model", None))
    found: Layers = {}
    for name, layer in manager.modules.items():
        names = manager.packed_modules.get(name, [name])
        if isinstance(layer, BaseLinearLayerWithLoRA) and layer.n_slices == len(names):
            for i, (own, parts) in enumerate(_split(layer, names)):
                learners = known.of(f"{own}.weight", f"{name}.weight").removesuffix(".weight")
                found[learners] = AdaptedSlice(own, layer, i, parts)
        else:
            found |= adapted_experts(name, layer)
    return found


def _split(layer: Any, names: list[str]) -> Iterator[tuple[str, tuple[Part, ...]]]:
    """Each slice's name and rows."""
    from vllm.model_executor.layers.linear import ColumnParallelLinear

    base = layer.base_layer
    if not isinstance(base, ColumnParallelLinear):
        num_rows, total = layer.lora_b_stacked[0].shape[2], base.output_size
        start = base.tp_rank * num_rows if num_rows < total else 0
        yield names[0], (Part(num_rows, start, total, counted=True),)
    elif len(names) == 1:
        yield names[0], tuple(row_parts(base))
    else:
        yield from ((name, (part,)) for name, part in zip(names, row_parts(base), strict=True))


def _shard(tensor: torch.Tensor, shape: tuple[int, ...], start: tuple[int, ...], *, counted: bool = True) -> Shard:
    from vllm.distributed import get_tensor_model_parallel_rank

    is_whole = tuple(tensor.shape) == shape
    return Shard(tensor, shape, start, get_tensor_model_parallel_rank() == 0 if is_whole else counted)
