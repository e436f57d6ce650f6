"""Whose turn it is at the store: one request at a time, in a thread; those that wait for a change are woken by it."""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

from fastapi import HTTPException, Request

from syncline.trajectory.queue import TrajectoryQueue
from syncline.trajectory.store import TrajectoryStore

T = TypeVar("T")


class Turns:
    """Gives requests their turn at the store, and wakes those that wait for a change."""

    def __init__(self, store: TrajectoryStore) -> None:
        self._store = store
        self._changed = asyncio.Condition()
        self._closing = False

    async def take(self, action: Callable[[TrajectoryQueue], T]) -> T:
        async with self._changed:
            result, _ = await self._run(action)
            return result

    async def poll(self, action: Callable[[TrajectoryQueue], T], *, timeout_seconds: float, request: Request) -> T:
        """Repeats `action` after every change until its answer is not empty, the time is up or the caller has gone."""
        clock = asyncio.get_running_loop().time
        deadline = clock() + timeout_seconds
        async with self._changed:
            while True:
                if self._closing or await request.is_disconnected():
                    raise HTTPException(503, "the trajectory server is shutting down")
                result, idle_seconds = await self._run(action)
                remaining = deadline - clock()
                if result or remaining <= 0:
                    return result
                with suppress(TimeoutError):
                    async with asyncio.timeout(min(remaining, idle_seconds)):
                        await self._changed.wait()

    async def close(self) -> None:
        """Ends all long polls, for a quick shutdown."""
        async with self._changed:
            self._closing = True
            self._changed.notify_all()

    async def _run(self, action: Callable[[TrajectoryQueue], T]) -> tuple[T, float]:
        """The result, and how long nothing can expire. The caller holds the condition."""

        def in_thread() -> tuple[T, float, bool]:
            with self._store.transaction() as queue:
                result = action(queue)
                return result, queue.ledger.seconds_to_deadline(), queue.ledger.dirty

        result, idle_seconds, changed = await asyncio.to_thread(in_thread)
        if changed:
            self._changed.notify_all()
        return result, idle_seconds
