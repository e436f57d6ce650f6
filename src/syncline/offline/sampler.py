"""Samples every work item on whatever engines live, and has each on disk before anything else is told of it.

    queue of items ─▶ workers (`concurrency` a replica) ─▶ queue of completions ─▶ writer ─▶ attempts.jsonl
          ▲   ▲           │ a replica fails: its items go back       │
          │   └───────────┘                                          │
          └────────────── what is due because of an answer ──────────┘

Workers pull, so a faster replica does more. A watch asks each replica how it is; one that is gone, broke off, or holds
other weights loses its workers and their items, and is joined again when it answers; after `lost_after_seconds` it is
given up. The run ends when no item is outstanding, or when no replica is left. The writer waits for completions alone
and takes all there are at once: one fsync for many.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from syncline.errors import EngineError, SyncError
from syncline.offline.lines import AppendOnlyLines
from syncline.offline.records import Attempt
from syncline.offline.replica import Gone, Replica
from syncline.offline.work import WorkItem
from syncline.types import Completion, SamplingParams

MAX_TRIES = 3
"""Of an item that engines answer wrongly though they live."""


@dataclass(frozen=True, slots=True)
class Request:
    """A work item as an engine is asked it."""

    item: WorkItem
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams


@dataclass(slots=True)
class Tally:
    """What happened so far, for the progress line and the stage's facts."""

    done: int = 0
    total: int = 0
    """Known so far; adaptive rounds add to it."""
    tokens: int = 0
    prompt_tokens: int = 0
    running: Counter[str] = field(default_factory=Counter)
    """By replica."""
    given_back: int = 0
    """Items that went back because their replica failed: sampled again elsewhere, written once."""
    lost: dict[str, str] = field(default_factory=dict)
    """Replica → why it was given up."""
    finish_reasons: Counter[str] = field(default_factory=Counter)


class _Down(Exception):
    """A replica must be joined anew."""


class Sampler:
    """`await Sampler(...).run(requests)`. `record` makes a completion's line; `on_written` says what it makes due.

    Raises `EngineError` when no replica is left or an item fails on living ones, `SyncError` for weights other than
    `model`.
    """

    def __init__(
        self,
        replicas: Sequence[Replica],
        lines: AppendOnlyLines,
        *,
        model: str,
        record: Callable[[Request, Completion], Attempt],
        on_written: Callable[[Request, Attempt], Iterable[Request]],
        concurrency: int,
        lost_after_seconds: float,
        poll_seconds: float = 1.0,
    ) -> None:
        self.tally = Tally()
        self._replicas = replicas
        self._lines = lines
        self._model = model
        self._record = record
        self._on_written = on_written
        self._concurrency = concurrency
        self._lost_after_seconds = lost_after_seconds
        self._poll_seconds = poll_seconds
        self._waiting: asyncio.Queue[Request] = asyncio.Queue()
        self._answered: asyncio.Queue[tuple[Request, Completion]] = asyncio.Queue()
        self._outstanding = 0
        self._faults: Counter[str] = Counter()
        self._over = asyncio.Event()

    async def run(self, requests: Iterable[Request]) -> None:
        self._add(requests)
        if self._outstanding == 0:
            return
        await _until_first_ends(
            self._over.wait(), self._write(), *(self._keep_serving(replica) for replica in self._replicas)
        )

    def _add(self, requests: Iterable[Request]) -> None:
        for request in requests:
            self._outstanding += 1
            self.tally.total += 1
            self._waiting.put_nowait(request)

    async def _write(self) -> None:
        while True:
            batch = [await self._answered.get()]
            while not self._answered.empty():
                batch.append(self._answered.get_nowait())
            records = [(request, completion, self._record(request, completion)) for request, completion in batch]
            await asyncio.to_thread(self._lines.append, *(attempt.model_dump() for _, _, attempt in records))
            for request, completion, attempt in records:
                self._count(request, completion)
                self._add(self._on_written(request, attempt))
            self._outstanding -= len(batch)
            if self._outstanding == 0:
                self._over.set()

    def _count(self, request: Request, completion: Completion) -> None:
        self.tally.done += 1
        self.tally.tokens += len(completion.token_ids)
        self.tally.prompt_tokens += len(request.prompt_token_ids)
        self.tally.finish_reasons[completion.finish_reason] += 1

    async def _keep_serving(self, replica: Replica) -> None:
        """Until the replica is given up; then waits for the others, unless it was the last."""
        while True:
            try:
                await self._join(replica)
            except EngineError as error:
                self.tally.lost[replica.name] = str(error)
                break
            workers = [self._work(replica) for _ in range(self._concurrency)]
            with suppress(_Down):
                await _until_first_ends(self._watch(replica), *workers)
        if self.tally.lost.keys() == {own.name for own in self._replicas}:  # one may be named twice
            reasons = "\n".join(f"  {fault}" for fault in self.tally.lost.values())
            raise EngineError(f"no engine is left, {self._outstanding} items are not done; run it again\n{reasons}")
        await self._over.wait()

    async def _join(self, replica: Replica) -> None:
        """Waits until it answers. Raises its last fault after `lost_after_seconds`, `SyncError` for other weights."""
        deadline = time.monotonic() + self._lost_after_seconds
        while True:
            try:
                return await self._check(replica)
            except EngineError:
                if time.monotonic() > deadline:
                    raise
            await asyncio.sleep(self._poll_seconds)

    async def _watch(self, replica: Replica) -> None:
        """An engine too busy to answer is given time; one that nobody listens at is not."""
        answered = time.monotonic()
        while True:
            await asyncio.sleep(self._poll_seconds)
            try:
                await self._check(replica)
                answered = time.monotonic()
            except Gone as error:
                raise _Down from error
            except EngineError as error:
                if time.monotonic() - answered > self._lost_after_seconds:
                    raise _Down from error

    async def _check(self, replica: Replica) -> None:
        if (held := await replica.digest()) != self._model:
            raise SyncError(
                f"engine {replica.name} holds the weights {held[:12]}, and these rollouts are of {self._model[:12]}; "
                "collect from one model at a time"
            )

    async def _work(self, replica: Replica) -> None:
        while True:
            request = await self._waiting.get()
            self.tally.running[replica.name] += 1
            try:
                completion = await replica.generate(request.prompt_token_ids, request.sampling)
            except asyncio.CancelledError:
                self._give_back(request)
                raise
            except EngineError as error:
                self._give_back(request)
                await self._blame(replica, request, error)
                raise _Down from error
            finally:
                self.tally.running[replica.name] -= 1
            self._answered.put_nowait((request, completion))

    def _give_back(self, request: Request) -> None:
        self.tally.given_back += 1
        self._waiting.put_nowait(request)

    async def _blame(self, replica: Replica, request: Request, error: EngineError) -> None:
        """The replica, if it does not answer; else the item, which may be asked a few times."""
        try:
            await replica.digest()
        except EngineError:
            return
        self._faults[request.item.key] += 1
        if self._faults[request.item.key] >= MAX_TRIES:
            raise EngineError(f"{request.item.key}: failed {MAX_TRIES} times on engines that live: {error}") from error


async def _until_first_ends(*parts: Coroutine[Any, Any, Any]) -> None:
    """Runs all; when the first returns or raises, the others are cancelled and waited for, and its fault is raised."""
    tasks = [asyncio.ensure_future(part) for part in parts]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for task in done:
        task.result()
