"""A process group of one learner (rank 0) and its engines' workers, apart from torch's default group.

NCCL between GPUs, gloo between CPUs. The learner hosts a store on one address; each party connects with its seat and
leaves by `Group.leave`. Nothing here blocks for good: connecting runs in a thread that is abandoned at the deadline,
collectives are started and then polled, and whoever waits also watches for news of the others (the engines for the
learner's last word in the store, the learner for its engines' answers). torch's own NCCL watchdog, which ends the
process of whoever lost a peer, is switched off for these groups: an engine outlives its learner, and joins the next.
"""

import os
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from threading import Event, Thread
from typing import Any, TypeVar

import torch
import torch.distributed as torch_distributed

from syncline.errors import SyncError

dist: Any = torch_distributed
"""What torch exports of these differs between its builds, and its stubs know less."""
LAST_WORD = "left"
WATCH_SECONDS = 0.1
POLL_SECONDS = 2e-5
CLOSE_SECONDS = 10.0
"""How long a party that leaves waits for torch to let go."""
_NEVER = timedelta(days=1)
_NO_WATCHDOG = {
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
    "TORCH_NCCL_ENABLE_MONITORING": "0",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
    "TORCH_NCCL_BLOCKING_WAIT": "0",
}
Result = TypeVar("Result")
Watch = Callable[[], None]
"""Raises when somebody waited for is known to be gone."""


@dataclass(frozen=True, slots=True)
class Seat:
    """One party's place in a group. `generation` is the group's name; no two groups have the same."""

    host: str
    port: int
    rank: int
    size: int
    generation: str


@dataclass(frozen=True, slots=True)
class Deadline:
    """A point in time; `seconds` is how long it was away when it was set."""

    seconds: float
    at: float

    @classmethod
    def after(cls, seconds: float) -> "Deadline":
        return cls(seconds, time.monotonic() + seconds)

    def wait(self, is_done: Callable[[], bool], *, doing: str, watch: Watch) -> None:
        """Polls until `is_done`. Raises `SyncError` saying what was being done when the deadline passed."""
        next_watch = time.monotonic() + WATCH_SECONDS
        while not is_done():
            now = time.monotonic()
            if now > self.at:
                raise SyncError(f"{doing}: not done after {self.seconds:g} s")
            if now > next_watch:
                watch()
                next_watch = now + WATCH_SECONDS
            time.sleep(POLL_SECONDS)


def listen(host: str, *, timeout_seconds: float) -> tuple[Any, int]:
    """The store the parties meet at, on a free port of `host` alone: whoever reaches it may join the group."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as listener:
        listener.bind((host, 0))
        listener.listen()
        port = listener.getsockname()[1]
        options = {"is_master": True, "wait_for_workers": False, "timeout": timedelta(seconds=timeout_seconds)}
        return dist.TCPStore(host, port, master_listen_fd=listener.detach(), **options), port


def say_last(store: Any, reason: str) -> None:
    """The learner's last word to whoever waits for it."""
    store.set(LAST_WORD, reason)


class Group:
    """A connected group. After a fault it is of no further use: leave it and connect anew."""

    def __init__(self, seat: Seat, store: Any, backend: Any) -> None:
        self.seat = seat
        self._store = store
        self._backend: Any = backend
        self._from_learner = dist.BroadcastOptions()
        self._from_learner.rootRank = 0

    @classmethod
    def host(cls, seat: Seat, device: torch.device, *, store: Any, deadline: Deadline, watch: Watch) -> "Group":
        """The learner's end; `store` is its own. Raises `SyncError` when not everybody came, and what `watch` does."""
        return cls(seat, store, _assembled(seat, device, deadline, watch))

    @classmethod
    def join(cls, seat: Seat, device: torch.device, *, deadline: Deadline) -> "Group":
        """An engine worker's end. Raises `SyncError` when not everybody came, or the learner has left."""
        try:
            news = _visit(seat, deadline)
        except RuntimeError as error:
            raise SyncError(f"nobody at {seat.host}:{seat.port}: {error}") from error
        return cls(seat, news, _assembled(seat, device, deadline, lambda: _refuse_if_left(news, seat)))

    def broadcast(self, tensor: torch.Tensor) -> Any:
        """Starts sending (rank 0) or receiving the flat `tensor`; returns torch's `Work`."""
        try:
            return self._backend.broadcast([tensor], self._from_learner)
        except RuntimeError as error:
            raise SyncError(f"a broadcast could not start: {error}") from error

    def refuse_if_left(self) -> None:
        """An engine's watch: raises `SyncError` with the learner's last word, or when it is gone without one."""
        _refuse_if_left(self._store, self.seat)

    def leave(self, reason: str) -> Future[None]:
        """Ends what is under way. The learner's reason is its last word to the engines still waiting for it.

        Closing the connections is left to a thread, because gloo first waits for operations that only their timeout
        or their peer ends; the answer is done when they are closed. A process should wait for it before it exits.
        """
        if self.seat.rank == 0:
            say_last(self._store, reason)
        last, aborted = [self._backend], Event()
        self._backend = None

        def close() -> None:
            try:
                last[0].abort()
            finally:
                aborted.set()
                last.clear()  # the only reference: torch closes here

        closing = in_thread(close)
        aborted.wait(CLOSE_SECONDS)
        return closing


def _visit(seat: Seat, deadline: Deadline) -> Any:
    """A connection to the learner's store. Each user of it has its own: one that waits blocks the others."""
    return dist.TCPStore(seat.host, seat.port, is_master=False, timeout=timedelta(seconds=deadline.seconds))


def _refuse_if_left(store: Any, seat: Seat) -> None:
    try:
        reason = store.get(LAST_WORD).decode() if store.check([LAST_WORD]) else None
    except RuntimeError as error:
        raise SyncError(f"the learner at {seat.host}:{seat.port} is gone") from error
    if reason is not None:
        raise SyncError(f"the learner left: {reason}")


def _assembled(seat: Seat, device: torch.device, deadline: Deadline, watch: Watch) -> Any:
    """The backend, once everybody is there."""
    doing = f"connecting {seat.size} parties at {seat.host}:{seat.port}"
    backend = in_thread(lambda: _connected(seat, _visit(seat, deadline), device, deadline))
    deadline.wait(backend.done, doing=doing, watch=watch)
    try:
        return backend.result()
    except RuntimeError as error:  # what torch raises for every fault of a store or a group
        watch()
        raise SyncError(f"{doing}: {error}") from error


def _connected(seat: Seat, store: Any, device: torch.device, deadline: Deadline) -> Any:
    """torch's backend object, used without a `ProcessGroup` around it: nothing is registered anywhere.

    One word goes from the learner to all: NCCL connects at the first collective, and that must not be a publish.
    """
    place = (dist.PrefixStore(seat.generation, store), seat.rank, seat.size)
    if device.type == "cpu":
        options: Any = dist.ProcessGroupGloo._Options()
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=_own_address(seat))]
        options._timeout = timedelta(seconds=deadline.seconds)
        backend = dist.ProcessGroupGloo(*place, options)
        backend.broadcast([torch.zeros(1)], dist.BroadcastOptions()).wait()
        return backend
    torch.cuda.set_device(device)
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = _NEVER
    with _environment(_NO_WATCHDOG):
        backend = dist.ProcessGroupNCCL(*place, options)
    backend.broadcast([torch.zeros(1, device=device)], dist.BroadcastOptions()).wait()
    torch.cuda.current_stream(device).synchronize()
    return backend


def _own_address(seat: Seat) -> str:
    """Of the interface that leads to the store."""
    with socket.socket(socket.AF_INET6 if ":" in seat.host else socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((seat.host, seat.port))
        return probe.getsockname()[0]


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """torch reads its NCCL switches when a group is built; other groups of the process keep their own."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def in_thread(call: Callable[[], Result]) -> Future[Result]:
    """Runs in a thread nobody has to wait for: a call into NCCL may never return."""
    future: Future[Result] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    Thread(target=run, daemon=True, name="syncline-collective").start()
    return future
