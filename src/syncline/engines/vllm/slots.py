"""vLLM's slots for adapters, filled from tensors that were sent, and read back for the digest.

vLLM keeps, for each adapted layer, stacked tensors with a padded matrix for every slot, and its kernels read those.
So the digest is of the slot, not of what was sent, and what lies in a slot beside the adapter must be zero. An adapter
is pinned: vLLM must not evict it, because it would look for the evicted one on a disk where it never was.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from syncline.bridges.adapter import A, AdapterLayout, B
from syncline.bridges.blocks import Together, copy_all
from syncline.bridges.manifest import Shard
from syncline.bridges.measure import Reading, layout_of
from syncline.engines.vllm import compat
from syncline.engines.vllm.adapter_pieces import AdaptedSlice, Layers
from syncline.engines.vllm.expert_slots import AdaptedExperts, stacks
from syncline.errors import SyncError


@dataclass(frozen=True, slots=True)
class Held:
    """An adapter of a layout in one slot: views that stay what they are as long as vLLM's stacks lie where they lie."""

    layout: AdapterLayout
    pieces: list[tuple[str, Shard]]
    """This rank's."""
    rest: list[tuple[str, torch.Tensor]]
    """What of the slot is no part of the adapter: padding up to the largest rank, and layers that are not adapted."""
    together: Together
    """One for the slots of a layout."""
    told: str
    """`measure.layout_of` the pieces."""


class Slots:
    """The slots of one rank. What follows from the model, a layout and a slot is worked out once: 196 layers of a 7B
    would take Python longer than a GPU takes to read them."""

    def __init__(self, manager: Any, layers: Layers) -> None:
        self.manager = manager
        self.layers = layers
        self.sizes = {name: layer.size for name, layer in layers.items()}
        """Name → inputs and outputs of the whole layer, of experts their number before them."""
        self._lie: tuple[int, ...] = ()
        """Where the stacks lay when `_held` was worked out."""
        self._held: dict[int, Held] = {}
        """The last of each slot."""

    def load(self, adapter_id: int, layout: AdapterLayout, tensors: Mapping[str, torch.Tensor]) -> Held:
        """Fills the adapter's slot, or a free one, and pins it. The tensors, on the slots' device, may be written again
        once that has caught up.

        vLLM zeroes the slot and fills those of experts; the pieces of linear layers are copied into it here, all at
        once. Where they alone are what the slot held last, vLLM has nothing to do. Other stages' layers are left out.
        """
        experts = [name for name in layout.modules() if isinstance(self.layers.get(name), AdaptedExperts)]
        pairs: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        for name in sorted(experts, key=lambda name: self.layers[name].index):
            pairs.setdefault(self.layers[name].name, []).append((tensors[name + A], tensors[name + B]))
        held = None if pairs else self._known(adapter_id, layout)
        if held is None:
            self._activate(adapter_id, pairs or self._zeros())
            held = self.held(adapter_id, layout)
        apart = {name + end for name in experts for end in (A, B)}
        pieces = [(name, shard) for name, shard in held.pieces if name not in apart]
        copy_all([shard.tensor for _, shard in pieces], [_part(tensors[name], shard) for name, shard in pieces])
        return held

    def _activate(self, adapter_id: int, pairs: Mapping[str, list[tuple[torch.Tensor, torch.Tensor]]]) -> None:
        self.manager.remove_adapter(adapter_id)
        adapter = compat.new_adapter(adapter_id, pairs)
        self.manager.add_adapter(adapter)
        self.manager.activate_adapter(adapter_id)
        self.manager.pin_adapter(adapter_id)
        adapter.loras.clear()  # views of a buffer that will hold the next version

    def _zeros(self) -> dict[str, list[tuple[torch.Tensor, torch.Tensor]]]:
        """A pair of one linear layer: vLLM takes no adapter that has none."""
        layer = next((layer for layer in self.layers.values() if isinstance(layer, AdaptedSlice)), None)
        if layer is None:
            raise SyncError("no linear layer of this rank can be adapted; set bridge.name to restart")
        like = {"dtype": self.manager.lora_config.lora_dtype, "device": self.manager.device}
        return {layer.name: [(torch.zeros(1, layer.num_inputs, **like), torch.zeros(layer.num_outputs, 1, **like))]}

    def read(self, held: Held) -> Reading:
        """What the slot holds now. Raises `SyncError` when that is more than the adapter."""
        if held.rest and torch.stack([tensor.any() for _, tensor in held.rest]).any():
            bad = next(name for name, tensor in held.rest if tensor.any())
            raise SyncError(f"{bad}: the engine's slot holds more than the adapter that was loaded into it")
        return Reading(held.told, held.together.digests(held.pieces), [])

    def held(self, adapter_id: int, layout: AdapterLayout) -> Held:
        """Where the adapter lies."""
        found = self._known(adapter_id, layout)
        if found is None:
            slot = self.manager.lora_index_to_id.index(adapter_id)
            self._held.pop(slot, None)
            found = self._held[slot] = self._found(slot, layout)
        return found

    def _known(self, adapter_id: int, layout: AdapterLayout) -> Held | None:
        """What the adapter's slot held last, if that was of this layout and lies where it lay."""
        lie = tuple(one.data_ptr() for module in self.manager.modules.values() for s in stacks(module) for one in s)
        if lie != self._lie:
            self._lie, self._held = lie, {}
        ids = self.manager.lora_index_to_id
        found = self._held.get(ids.index(adapter_id)) if adapter_id in ids else None
        return found if found is not None and found.layout is layout else None

    def _found(self, slot: int, layout: AdapterLayout) -> Held:
        pieces: list[tuple[str, Shard]] = []
        for name in (module for module in layout.modules() if module in self.layers):
            rank = layout.shapes[name + A][-2]
            pieces.append((name + A, self.layers[name].a(slot, rank)))
            pieces += [(name + B, piece) for piece in self.layers[name].b(slot, rank)]
        rest = [(name, tensor) for name, tensor in self._rest(slot, layout) if tensor.numel()]
        others = (held for held in self._held.values() if held.layout is layout)
        if other := next(others, None):
            return Held(layout, pieces, rest, other.together, other.told)
        together = Together(pieces)
        return Held(layout, pieces, rest, together, layout_of(together.pieces))

    def _rest(self, slot: int, layout: AdapterLayout) -> Iterator[tuple[str, torch.Tensor]]:
        adapted = {
            (id(part.layer), part.index): name for name, part in self.layers.items() if name + A in layout.shapes
        }
        for module_name, module in self.manager.modules.items():
            for i, (a, b) in enumerate(stacks(module)):
                name = adapted.get((id(module), i))
                if name is None:
                    yield module_name, a[slot]
                    yield module_name, b[slot]
                else:
                    beside = self.layers[name].beside(slot, layout.shapes[name + A][-2])
                    yield from ((name, tensor) for tensor in beside)


def _part(tensor: torch.Tensor, shard: Shard) -> torch.Tensor:
    """What a rank's piece holds of the whole."""
    if shard.tensor.shape == tensor.shape:
        return tensor
    places = zip(shard.start, shard.tensor.shape, strict=True)
    return tensor[tuple(slice(start, start + size) for start, size in places)]


def whole(slots: Slots) -> AdapterLayout:
    """The layout of all that a slot can hold, for an adapter whose own is not known."""
    shapes: dict[str, tuple[int, ...]] = {}
    config = slots.manager.lora_config
    rank = config.max_lora_rank
    for name, (*experts, num_inputs, num_outputs) in slots.sizes.items():
        shapes |= {name + A: (*experts, rank, num_inputs), name + B: (*experts, num_outputs, rank)}
    return AdapterLayout(shapes, str(config.lora_dtype).removeprefix("torch."))
