"""The worker's side of adapters: they arrive, are loaded into slots, and are told of."""

from collections.abc import Callable
from typing import Any

from syncline.bridges.adapter import A, AdapterLayout, B, listed, what_cannot_be_held
from syncline.bridges.carriers import Receiver, whereabouts
from syncline.bridges.measure import Reading
from syncline.engines.vllm import compat
from syncline.engines.vllm.adapter_pieces import adaptable
from syncline.engines.vllm.answer import answer
from syncline.engines.vllm.slots import Held, Slots, whole
from syncline.errors import SyncError


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

    def syncline_stage(self, adapter_id: int, layout_text: str, source: dict[str, Any]) -> dict[str, Any]:
        """Loads one, in place of what has the id; what this rank's slot then holds, a `measure.Reading`.

        After a fault of any rank, `syncline_drop` makes them alike again."""

        def fill(slots: Slots) -> Held:
            layout = self._layout(layout_text, slots)
            self._receiver = self._receiver or Receiver(self.device)
            return slots.load(adapter_id, layout, self._receiver.receive(source, layout))

        return self._added(adapter_id, fill)

    def syncline_load_folder(self, adapter_id: int, name: str, path: str) -> dict[str, Any]:
        """As `syncline_stage`, from any PEFT folder, by vLLM's own loader and checks."""
        from vllm.lora.request import LoRARequest

        def fill(slots: Slots) -> Held:
            self.syncline_drop([adapter_id])
            try:
                self.model_runner.add_lora(LoRARequest(name, adapter_id, path))
            except (ValueError, OSError, KeyError) as error:
                raise SyncError(f"vLLM cannot load {path}: {error}") from error
            slots.manager.pin_adapter(adapter_id)
            return slots.held(adapter_id, whole(slots))

        return self._added(adapter_id, fill)

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

    def _added(self, adapter_id: int, fill: Callable[[Slots], Held]) -> dict[str, Any]:
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

    def _layout(self, text: str, slots: Slots) -> AdapterLayout:
        """The one in use, where a new version has it too; otherwise one that the slots can hold."""
        for layout in (self._layouts or {}).values():
            if layout.text == text:
                return layout
        layout = AdapterLayout.from_text(text)
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
