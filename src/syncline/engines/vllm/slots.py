"""The worker's side of adapters: vLLM's slots filled from a buffer, and read back for the digest.

vLLM keeps, for each adapted layer, stacked tensors with a padded matrix for every slot, and its kernels read those.
So the digest is of the slot, not of what was sent, and what lies in a slot beside the adapter must be zero. An adapter
is pinned: vLLM must not evict it, because it would look for the evicted one on a disk where it never was.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from syncline.bridges.adapter import A, AdapterLayout, B, listed, what_cannot_be_held
from syncline.bridges.blocks import digested
from syncline.bridges.carriers import Receiver, whereabouts
from syncline.bridges.manifest import Shard
from syncline.bridges.receipt import Piece
from syncline.engines.vllm import compat
from syncline.engines.vllm.adapter_pieces import Layers, adaptable
from syncline.engines.vllm.answer import answer
from syncline.engines.vllm.expert_slots import stacks
from syncline.errors import SyncError


def sizes(layers: Layers) -> dict[str, list[int]]:
    """Name → inputs and outputs of the whole layer, of experts their number before them."""
    return {name: part.size for name, part in layers.items()}


def load(manager: Any, adapter_id: int, layout: AdapterLayout, buffer: torch.Tensor) -> None:
    """Fills a free slot from the buffer and pins it. The buffer may be written again once the device has caught up.

    Of a layer split over ranks vLLM takes this rank's part of the whole. Other stages' layers are left out."""
    views, layers = layout.views(buffer), adaptable(manager)
    pairs: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    here = ((name, layers[name]) for name in layout.modules() if name in layers)
    for name, part in sorted(here, key=lambda found: found[1].index):
        pairs.setdefault(part.name, []).append((views[name + A], views[name + B]))
    adapter = compat.new_adapter(adapter_id, pairs)
    manager.add_adapter(adapter)
    manager.activate_adapter(adapter_id)
    manager.pin_adapter(adapter_id)
    adapter.loras.clear()  # views of a buffer that will hold the next version


def read(manager: Any, layers: Layers, adapter_id: int, layout: AdapterLayout) -> list[tuple[str, Shard]]:
    """This rank's pieces of an adapter, views of its slot. Raises `SyncError` when the slot holds more than them."""
    slot = manager.lora_index_to_id.index(adapter_id)
    rest = [(name, tensor) for name, tensor in _rest(manager, layers, slot, layout) if tensor.numel()]
    if rest and torch.stack([tensor.any() for _, tensor in rest]).any():
        bad = next(name for name, tensor in rest if tensor.any())
        raise SyncError(f"{bad}: the engine's slot holds more than the adapter that was loaded into it")
    pieces: list[tuple[str, Shard]] = []
    for name in (module for module in layout.modules() if module in layers):
        rank = layout.shapes[name + A][-2]
        pieces.append((name + A, layers[name].a(slot, rank)))
        pieces += [(name + B, piece) for piece in layers[name].b(slot, rank)]
    return pieces


def whole(manager: Any) -> AdapterLayout:
    """The layout of all that a slot can hold, for an adapter whose own is not known."""
    shapes: dict[str, tuple[int, ...]] = {}
    rank = manager.lora_config.max_lora_rank
    for name, (*experts, num_inputs, num_outputs) in sizes(adaptable(manager)).items():
        shapes |= {name + A: (*experts, rank, num_inputs), name + B: (*experts, num_outputs, rank)}
    return AdapterLayout(shapes, str(manager.lora_config.lora_dtype).removeprefix("torch."))


def _rest(manager: Any, layers: Layers, slot: int, layout: AdapterLayout) -> Iterator[tuple[str, torch.Tensor]]:
    """What of a slot is no part of the adapter: padding up to the largest rank, and layers that are not adapted."""
    adapted = {(id(part.layer), part.index): name for name, part in layers.items() if name + A in layout.shapes}
    for module_name, module in manager.modules.items():
        for i, (a, b) in enumerate(stacks(module)):
            name = adapted.get((id(module), i))
            if name is None:
                yield module_name, a[slot]
                yield module_name, b[slot]
            else:
                yield from ((name, tensor) for tensor in layers[name].beside(slot, layout.shapes[name + A][-2]))


class AdapterExtension:
    """Methods of vLLM's worker, called by name. What it cannot do is a fault, and the engine goes on as it was."""

    device: Any
    model_runner: Any
    parallel_config: Any
    _receiver: Receiver | None = None
    _layouts: dict[int, AdapterLayout] | None = None

    def syncline_adapters(self) -> dict[str, Any]:
        """What `EngineControl.adapters` answers, of this rank."""
        manager = compat.adapter_manager(self.model_runner)
        about = {
            "dtype": str(manager.lora_config.lora_dtype).removeprefix("torch."),
            "max_rank": manager.lora_config.max_lora_rank,
            "modules": sizes(adaptable(manager)),
            "whereabouts": whereabouts(self.device),
        }
        return answer(lambda: about)

    def syncline_stage(self, adapter_id: int, adapter: dict[str, Any], drop: list[int]) -> dict[str, Any]:
        """Drops adapters, loads one; what this rank's slot then holds, for `receipt.combined`.

        After a fault of any rank, `syncline_drop` makes them alike again."""
        layout = AdapterLayout(adapter["shapes"], adapter["dtype"])

        def fill(manager: Any) -> AdapterLayout:
            _refuse(manager, layout, stages=self.parallel_config.pipeline_parallel_size)
            self._receiver = self._receiver or Receiver(self.device)
            load(manager, adapter_id, layout, self._receiver.receive(adapter["source"], layout))
            return layout

        return self._added(adapter_id, drop, fill)

    def syncline_load_folder(self, adapter_id: int, name: str, path: str, drop: list[int]) -> dict[str, Any]:
        """As `syncline_stage`, from any PEFT folder, by vLLM's own loader and checks."""
        from vllm.lora.request import LoRARequest

        def fill(manager: Any) -> AdapterLayout:
            try:
                self.model_runner.add_lora(LoRARequest(name, adapter_id, path))
            except (ValueError, OSError, KeyError) as error:
                raise SyncError(f"vLLM cannot load {path}: {error}") from error
            manager.pin_adapter(adapter_id)
            return whole(manager)

        return self._added(adapter_id, drop, fill)

    def syncline_held(self, adapter_id: int) -> dict[str, Any]:
        """An adapter's slot, digested again."""
        return answer(lambda: self._digests(adapter_id))

    def syncline_drop(self, adapter_ids: list[int]) -> dict[str, Any]:
        """Frees the slots of those that this rank holds."""
        for adapter_id in adapter_ids:
            compat.adapter_manager(self.model_runner).remove_adapter(adapter_id)
        self._layouts = {i: layout for i, layout in (self._layouts or {}).items() if i not in adapter_ids}
        return {"value": None}

    def _added(self, adapter_id: int, drop: list[int], fill: Callable[[Any], AdapterLayout]) -> dict[str, Any]:
        self.syncline_drop(drop)

        def added() -> list[tuple[Piece, int]]:
            layout = fill(compat.adapter_manager(self.model_runner))
            self._layouts = {**(self._layouts or {}), adapter_id: layout}
            return self._digests(adapter_id)

        return answer(added)

    def _digests(self, adapter_id: int) -> list[tuple[Piece, int]]:
        manager, layout = compat.adapter_manager(self.model_runner), (self._layouts or {})[adapter_id]
        return digested(read(manager, adaptable(manager), adapter_id, layout))


def _refuse(manager: Any, layout: AdapterLayout, *, stages: int) -> None:
    """What no stage holds, the bridge has refused before it sent anything."""
    held = {"modules": sizes(adaptable(manager)), "max_rank": manager.lora_config.max_lora_rank}
    here = {name + end for name in held["modules"] for end in (A, B)}
    shapes = {name: shape for name, shape in layout.shapes.items() if stages == 1 or name in here}
    if faults := what_cannot_be_held(shapes, held):
        raise SyncError(listed(faults))
    if layout.dtype != manager.lora_config.lora_dtype:
        raise SyncError(f"the adapter is {layout.dtype}, the engine's slots {manager.lora_config.lora_dtype}")
