"""The worker's side of adapters: vLLM's slots filled from a buffer, and read back for the digest.

vLLM keeps, for each adapted layer, stacked tensors with a padded matrix for every slot, and its kernels read those.
So the digest is of the slot, not of what was sent, and what lies in a slot beside the adapter must be zero. An adapter
is pinned: vLLM must not evict it, because it would look for the evicted one on a disk where it never was.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from syncline.bridges.adapter import A, AdapterLayout, B, listed, what_cannot_be_held
from syncline.bridges.blocks import Together, copy_all
from syncline.bridges.carriers import Receiver, whereabouts
from syncline.bridges.manifest import Shard
from syncline.bridges.measure import Reading, layout_of
from syncline.engines.vllm import compat
from syncline.engines.vllm.adapter_pieces import AdaptedSlice, Layers, adaptable
from syncline.engines.vllm.answer import answer
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
        """Fills a free slot and pins it. The tensors, on the slots' device, may be written again once that has caught
        up.

        vLLM zeroes the slot and fills those of experts; the pieces of linear layers are copied into it here, all at
        once. Other stages' layers are left out."""
        experts = [name for name in layout.modules() if isinstance(self.layers.get(name), AdaptedExperts)]
        pairs: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        for name in sorted(experts, key=lambda name: self.layers[name].index):
            pairs.setdefault(self.layers[name].name, []).append((tensors[name + A], tensors[name + B]))
        adapter = compat.new_adapter(adapter_id, pairs or self._zeros())
        self.manager.add_adapter(adapter)
        self.manager.activate_adapter(adapter_id)
        self.manager.pin_adapter(adapter_id)
        adapter.loras.clear()  # views of a buffer that will hold the next version
        apart = {name + end for name in experts for end in (A, B)}
        held = self.held(adapter_id, layout)
        pieces = [(name, shard) for name, shard in held.pieces if name not in apart]
        copy_all([shard.tensor for _, shard in pieces], [_part(tensors[name], shard) for name, shard in pieces])
        return held

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
        lie = tuple(one.data_ptr() for module in self.manager.modules.values() for s in stacks(module) for one in s)
        if lie != self._lie:
            self._lie, self._held = lie, {}
        slot = self.manager.lora_index_to_id.index(adapter_id)
        found = self._held.get(slot)
        if found is None or found.layout is not layout:
            self._held.pop(slot, None)
            found = self._held[slot] = self._found(slot, layout)
        return found

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


class AdapterExtension:
    """Methods of vLLM's worker, called by name. What it cannot do is a fault, and the engine goes on as it was."""

    device: Any
    model_runner: Any
    parallel_config: Any
    _receiver: Receiver | None = None
    _slots: Slots | None = None
    _layouts: dict[int, AdapterLayout] | None = None

    def syncline_adapters(self) -> dict[str, Any]:
        """What `EngineControl.adapters` answers, of this rank."""
        slots = self._own_slots()
        config = slots.manager.lora_config
        about = {
            "dtype": str(config.lora_dtype).removeprefix("torch."),
            "max_rank": config.max_lora_rank,
            "modules": slots.sizes,
            "whereabouts": whereabouts(self.device),
        }
        return answer(lambda: about)

    def syncline_stage(self, adapter_id: int, adapter: dict[str, Any], drop: list[int]) -> dict[str, Any]:
        """Drops adapters, loads one; what this rank's slot then holds, a `measure.Reading`.

        After a fault of any rank, `syncline_drop` makes them alike again."""

        def fill(slots: Slots) -> Held:
            layout = self._layout(adapter, slots)
            self._receiver = self._receiver or Receiver(self.device)
            return slots.load(adapter_id, layout, self._receiver.receive(adapter["source"], layout))

        return self._added(adapter_id, drop, fill)

    def syncline_load_folder(self, adapter_id: int, name: str, path: str, drop: list[int]) -> dict[str, Any]:
        """As `syncline_stage`, from any PEFT folder, by vLLM's own loader and checks."""
        from vllm.lora.request import LoRARequest

        def fill(slots: Slots) -> Held:
            try:
                self.model_runner.add_lora(LoRARequest(name, adapter_id, path))
            except (ValueError, OSError, KeyError) as error:
                raise SyncError(f"vLLM cannot load {path}: {error}") from error
            slots.manager.pin_adapter(adapter_id)
            return slots.held(adapter_id, whole(slots))

        return self._added(adapter_id, drop, fill)

    def syncline_held(self, adapter_id: int) -> dict[str, Any]:
        """An adapter's slot, read again."""
        return answer(lambda: self._own_slots().read(self._held(adapter_id)))

    def syncline_held_pieces(self, adapter_id: int) -> dict[str, Any]:
        """The `receipt.Piece`s that a reading of the slot is of."""
        return answer(lambda: self._held(adapter_id).together.pieces)

    def syncline_drop(self, adapter_ids: list[int]) -> dict[str, Any]:
        """Frees the slots of those that this rank holds."""
        for adapter_id in adapter_ids:
            compat.adapter_manager(self.model_runner).remove_adapter(adapter_id)
        self._layouts = {i: layout for i, layout in (self._layouts or {}).items() if i not in adapter_ids}
        return {"value": None}

    def _added(self, adapter_id: int, drop: list[int], fill: Callable[[Slots], Held]) -> dict[str, Any]:
        self.syncline_drop(drop)

        def added() -> Reading:
            slots = self._own_slots()
            held = fill(slots)
            self._layouts = {**(self._layouts or {}), adapter_id: held.layout}
            return slots.read(held)

        return answer(added)

    def _held(self, adapter_id: int) -> Held:
        return self._own_slots().held(adapter_id, (self._layouts or {})[adapter_id])

    def _own_slots(self) -> Slots:
        manager = compat.adapter_manager(self.model_runner)
        if self._slots is None or self._slots.manager is not manager:
            self._slots = Slots(manager, adaptable(manager))
        return self._slots

    def _layout(self, adapter: dict[str, Any], slots: Slots) -> AdapterLayout:
        """The one in use, where a new version has it too; otherwise one that the slots can hold."""
        shapes = {name: tuple(shape) for name, shape in adapter["shapes"].items()}
        for layout in (self._layouts or {}).values():
            if layout.has(shapes, adapter["dtype"]):
                return layout
        layout = AdapterLayout(shapes, adapter["dtype"])
        _refuse(slots, layout, stages=self.parallel_config.pipeline_parallel_size)
        return layout


def _refuse(slots: Slots, layout: AdapterLayout, *, stages: int) -> None:
    """What no stage holds, the bridge has refused before it sent anything."""
    config = slots.manager.lora_config
    held = {"modules": slots.sizes, "max_rank": config.max_lora_rank}
    here = {name + end for name in held["modules"] for end in (A, B)}
    shapes = {name: shape for name, shape in layout.shapes.items() if stages == 1 or name in here}
    if faults := what_cannot_be_held(shapes, held):
        raise SyncError(listed(faults))
    if layout.dtype != config.lora_dtype:
        raise SyncError(f"the adapter is {layout.dtype}, the engine's slots {config.lora_dtype}")
