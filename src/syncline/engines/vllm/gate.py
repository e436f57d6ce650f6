"""The gate every sampling request passes: it knows under which policy version each token is sampled.

Requests enter while the gate is open and stay inside until they end. `close` stops new ones at the door; then either
those inside end (drain, abort), or the engine freezes them at a token boundary (keep) once each has reached it. Only
while the gate is `still` may weights and version change, so a token belongs to the version named last before it.
Producers: the generate route. Waits: `wait_until_empty` and `wait_until_submitted` (for requests inside, with a
deadline) and requests at a closed door (for `open`). Unblocks: a leaving or submitted request, `open`, and `shut`,
after which nobody waits any more: a server that ends waits for its requests. Nothing here takes a lock, since all of it
happens on one event loop: a request that is cancelled as it leaves has left.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from syncline.errors import EngineError, EngineGone, EngineTimeout

UNPUBLISHED = -1

Sampled = Mapping[str, Mapping[int, int]]
"""Request id → index of the completion → tokens it has sampled. Finished completions are left out."""


@dataclass(slots=True, eq=False)
class Visit:
    """One request inside the gate."""

    request_id: str
    entered_under: int
    salt: str = ""
    """Of the KV blocks that its prompt may use and fill: see `Gate.salt`."""
    can_freeze: bool = True
    """`False`: a pause that keeps requests lets this one end first."""
    is_submitted: bool = False
    """The engine has it; from then on it knows how many tokens were sampled."""
    changes: list[tuple[int, Mapping[int, int]]] = field(default_factory=list)
    """Each version named since: what every unfinished completion had sampled by then."""

    def spans(self, completion: int, num_tokens: int) -> list[tuple[int, int, int]]:
        """`(policy version, start, end)` of the completion's tokens; none when some precede the first publish."""
        starts = [(self.entered_under, 0)]
        starts += [(version, sampled.get(completion, num_tokens)) for version, sampled in self.changes]
        ends = [start for _, start in starts[1:]] + [num_tokens]
        spans = [(version, start, end) for (version, start), end in zip(starts, ends, strict=True) if start < end]
        return [] if any(version == UNPUBLISHED for version, _, _ in spans) else spans


class Gate:
    def __init__(self, policy_version: int = UNPUBLISHED) -> None:
        self.policy_version = policy_version
        self.is_open = True
        self.is_still = False
        """Nothing samples and nothing can begin to: weights and version may change."""
        self.num_pauses = 0
        """The last pause has this number."""
        self._is_shut = False
        self._inside: set[Visit] = set()
        self._changed = asyncio.Event()

    @property
    def num_inside(self) -> int:
        return len(self._inside)

    @property
    def salt(self) -> str:
        """Another one after each pause, in which the weights may have changed: blocks filled under them are no other
        request's to use."""
        return f"syncline-{self.num_pauses}"

    @asynccontextmanager
    async def request(self, request_id: str, *, can_freeze: bool = True) -> AsyncIterator[Visit]:
        """Waits for the gate to be open. Raises `EngineGone` once it is shut."""
        await self._until(lambda: self.is_open or self._is_shut)
        if self._is_shut:
            raise EngineGone("the engine is ending, or starting anew")
        visit = Visit(request_id, self.policy_version, self.salt, can_freeze)
        self._inside.add(visit)
        try:
            yield visit
        finally:
            self._inside.remove(visit)
            self._tell()

    async def submitted(self, visit: Visit) -> None:
        visit.is_submitted = True
        self._tell()

    def close(self) -> int:
        """Stops new requests at the door; those inside go on. Returns the pause's number: whoever has waited finds out
        by it (`need`) that others have ended the pause, or begun another, meanwhile."""
        self.is_open = False
        self.num_pauses += 1
        return self.num_pauses

    def need(self, pause: int) -> None:
        """Raises `EngineError` unless the gate is closed, and by this pause."""
        if self.is_open or pause != self.num_pauses:
            now = "resumed" if self.is_open else "paused again"
            raise EngineError(f"pause {pause} of this engine is over: it has been {now} meanwhile")

    def shut(self) -> None:
        """For good: this process ends. Those at the door are sent away, to ask again."""
        self._is_shut = True
        self._tell()

    async def wait_until_empty(self, *, timeout_seconds: float) -> None:
        """Raises `EngineTimeout` when requests are still inside at the deadline."""
        await self._wait(
            lambda: not self._inside,
            timeout_seconds,
            "were still running",
            "raise bridge.timeout_seconds or set bridge.in_flight to keep or abort",
        )

    async def wait_until_submitted(self, *, timeout_seconds: float) -> None:
        """Raises `EngineTimeout` when the engine has not yet taken every request at the deadline."""
        await self._wait(
            lambda: all(visit.is_submitted for visit in self._inside),
            timeout_seconds,
            "had not all reached the engine",
            "raise bridge.timeout_seconds",
        )

    async def wait_until_freezable(self, *, timeout_seconds: float) -> None:
        """Raises `EngineTimeout` when requests that cannot be frozen are still inside at the deadline."""
        await self._wait(
            lambda: all(visit.is_submitted and visit.can_freeze for visit in self._inside),
            timeout_seconds,
            "had not all reached the engine, or cannot be frozen and were still running,",
            "raise bridge.timeout_seconds or set bridge.in_flight to drain or abort",
        )

    def freeze(self, pause: int) -> None:
        """The engine has stopped for this pause: from now on the gate is still."""
        self.need(pause)
        self.is_still = True

    def name(self, policy_version: int, sampled: Sampled) -> None:
        """What is sampled from now on is of `policy_version`; `sampled` is where requests inside stand."""
        for visit in self._inside:
            visit.changes.append((policy_version, sampled.get(visit.request_id, {})))
        self.policy_version = policy_version

    def open(self, pause: int) -> None:
        """Ends this pause."""
        self.need(pause)
        self.is_still = False
        self.is_open = True
        self._tell()

    async def _wait(self, done: Callable[[], bool], timeout_seconds: float, what: str, remedy: str) -> None:
        try:
            async with asyncio.timeout(timeout_seconds):
                await self._until(done)
        except TimeoutError as error:
            raise EngineTimeout(
                f"{self.num_inside} requests {what} {timeout_seconds:g} s after the pause; {remedy}"
            ) from error

    async def _until(self, done: Callable[[], bool]) -> None:
        while not done():
            await self._changed.wait()

    def _tell(self) -> None:
        """All who wait look again."""
        self._changed.set()
        self._changed.clear()
