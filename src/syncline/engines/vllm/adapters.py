"""Which adapters the engine holds, which one new requests get, and how many requests run under each.

An adapter lives in a slot of vLLM's, under the slot's id and a name that is never used again, and stays until its slot
is wanted and its last request has ended. Who waits for whom: `room` waits, with a deadline, for requests under adapters
that new requests no longer get; a request that ends unblocks it. All of it happens on the server's event loop, so
between two awaits nothing changes.
"""

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from syncline.errors import EngineError, EngineTimeout

_FIRST_ID = 1 << 20
"""Above the ids vLLM gives to its warm-up adapters and to its own routes."""


@dataclass(slots=True, eq=False)
class Adapter:
    """An adapter in the engine. `path` is a folder loaded by hand, or only a name where a bridge sent the tensors."""

    name: str
    path: str
    id: int = 0
    """Of its slot, once it has one; whatever is loaded there next has it too. 0: none yet."""
    parameters: dict[str, str] = field(default_factory=dict)
    """Name → dtype, shape and digest of what its slot holds."""
    num_running: int = 0

    def request(self) -> Any:
        from vllm.lora.request import LoRARequest

        return LoRARequest(self.name, self.id, self.path)


class Adapters:
    """`num_slots` adapters at once; 0: the engine was started without."""

    def __init__(self, num_slots: int = 0) -> None:
        self.num_slots = num_slots
        self.policy: Adapter | None = None
        """The last one a bridge switched to."""
        self.by_hand: Adapter | None = None
        """Loaded over `/lora/load`: what is sampled from it is no policy's."""
        self.loading = asyncio.Lock()
        """One adapter at a time is loaded."""
        self.held: list[Adapter] = []
        self._numbers = count(1)
        self._left = asyncio.Event()

    @property
    def current(self) -> Adapter | None:
        """What new requests get; `None`: the base alone."""
        return self.by_hand or self.policy

    def new(self, name: str, path: str | None = None) -> Adapter:
        """An adapter that is not yet held. vLLM tells adapters' KV blocks apart by name."""
        unique = f"{name}-{next(self._numbers)}"
        return Adapter(unique, path or f"/syncline/{unique}")

    @contextmanager
    def running(self) -> Iterator[Adapter | None]:
        """A request, under the adapter that is current now, to its end."""
        adapter = self.current
        if adapter is None:
            yield None
            return
        adapter.num_running += 1
        try:
            yield adapter
        finally:
            adapter.num_running -= 1
            self._left.set()

    def refuse_without(self) -> None:
        if not self.num_slots:
            raise EngineError("no adapters are served; set model.lora (--enable-lora), and bridge.name lora or shared")

    async def room(self, *, timeout_seconds: float) -> int:
        """Waits until one more fits; the id of its slot. What was there is no longer held. Raises `EngineTimeout`."""
        self.refuse_without()
        deadline = time.monotonic() + timeout_seconds
        while (slot := self._free_slot()) is None:
            idle = [a for a in self.held if a not in (self.policy, self.by_hand) and not a.num_running]
            if idle:
                self.held.remove(idle[0])
                continue
            self._left.clear()
            try:
                await asyncio.wait_for(self._left.wait(), max(0.0, deadline - time.monotonic()))
            except TimeoutError as error:
                raise EngineTimeout(
                    f"{self._still_running()} still ran {timeout_seconds:g} s after a newer version was switched to; "
                    "raise bridge.timeout_seconds or set bridge.in_flight to abort"
                ) from error
        return slot

    def _free_slot(self) -> int | None:
        taken = {adapter.id for adapter in self.held}
        return next((i for i in range(_FIRST_ID, _FIRST_ID + self.num_slots) if i not in taken), None)

    def _still_running(self) -> str:
        return ", ".join(f"{a.num_running} requests under {a.name}" for a in self.held if a is not self.policy)
