"""The gate every sampling request passes: it knows under which policy version each one runs.

Requests enter while the gate is open and are counted until they leave; `close` stops new ones at the door and waits
for those inside, so between `close` and `open` nothing samples and the version may change. A request therefore runs
under one version from its first token to its last. Producers: the generate route. Waits: `close` (for the last
request to leave, with a deadline) and requests at a closed door (for `open`). Unblocks: a leaving request, `open`.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from syncline.errors import EngineTimeout

UNPUBLISHED = -1


class Gate:
    def __init__(self, policy_version: int = UNPUBLISHED) -> None:
        self.policy_version = policy_version
        self.is_open = True
        self.num_inside = 0
        self._changed = asyncio.Condition()

    @asynccontextmanager
    async def request(self) -> AsyncIterator[int]:
        """Waits for the gate to be open; yields the policy version the request runs under."""
        async with self._changed:
            await self._changed.wait_for(lambda: self.is_open)
            self.num_inside += 1
        try:
            yield self.policy_version
        finally:
            async with self._changed:
                self.num_inside -= 1
                self._changed.notify_all()

    async def close(self) -> None:
        """Stops new requests at the door; those inside go on."""
        async with self._changed:
            self.is_open = False

    async def wait_until_empty(self, *, timeout_seconds: float) -> None:
        """Raises `EngineTimeout` when requests are still inside at the deadline."""
        async with self._changed:
            try:
                await asyncio.wait_for(self._changed.wait_for(lambda: self.num_inside == 0), timeout_seconds)
            except TimeoutError as error:
                raise EngineTimeout(
                    f"{self.num_inside} requests were still running {timeout_seconds:g} s after the pause; "
                    "raise bridge.timeout_seconds or set bridge.in_flight=abort"
                ) from error

    async def open(self) -> None:
        async with self._changed:
            self.is_open = True
            self._changed.notify_all()
