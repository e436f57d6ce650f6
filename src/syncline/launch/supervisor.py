"""Starts a run's processes, watches them, and leaves nothing behind.

Who produces: one thread a process reports its end the moment it happens; one thread a starting service reports that
its health answers; the signal handler reports Ctrl-C. Who waits: the main thread, on one queue of those events, waking
five times a second to show logs and check deadlines. Who unblocks: any event. The first process that ends when it
should not have ends the run, and is the one named; but a service of a `Pool` is started again while enough others live.
"""

import http.client
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

from syncline.errors import ProcessDied
from syncline.launch.child import Child, Exited
from syncline.launch.groups import subreaper
from syncline.launch.guardian import DONE
from syncline.launch.plan import Kind, ProcessSpec, Ready
from syncline.observe.files import PROCESSES_FILE, last_lines, write_atomically
from syncline.observe.logs import LogTail

TICK_SECONDS = 0.2
HEALTH_SECONDS = 0.1
HEALTH_TIMEOUT_SECONDS = 2.0
LAST_LINES = 12
OUR_EXIT_CODES = (1, 2, 3, 4, 5, 6, 7, 9)
"""The codes of `errors.py` that a process may end with by its own choice; any other end is a death, code 8."""


class Interrupted(Exception):
    """Somebody asked the run to stop, by Ctrl-C or a signal. The exit code follows the shell: 128 + signal."""

    def __init__(self, number: int) -> None:
        self.exit_code = 128 + number
        super().__init__(f"stopped by {signal.Signals(number).name}")


@dataclass(frozen=True, slots=True)
class _BecameReady:
    name: str


@dataclass(frozen=True, slots=True)
class _Signalled:
    number: int


class Supervisor:
    """`with Supervisor(specs, folder=...) as s: s.run()`; leaving it, by whatever way, stops everything it started."""

    def __init__(
        self,
        specs: Sequence[ProcessSpec],
        *,
        folder: Path,
        show: Callable[[str], None] = print,
        refresh: Callable[[], None] = lambda: None,
        lock_fd: int | None = None,
        grace_seconds: float = 10.0,
    ) -> None:
        """`show` prints a line; `refresh` is called five times a second; `lock_fd` is handed to the guardian."""
        self._specs = {spec.name: spec for spec in specs}
        self._folder = folder
        self._show = show
        self._refresh = refresh
        self._lock_fd = lock_fd
        self._grace_seconds = grace_seconds
        self._events: queue.SimpleQueue[Exited | _BecameReady | _Signalled] = queue.SimpleQueue()
        self._num_signals = 0
        self._children: dict[str, Child] = {}
        self._started: dict[str, None] = {}
        """In the order of their first start, which they keep when they are started again."""
        self._ready: set[str] = set()
        self._ended: set[str] = set()
        self._num_restarts: Counter[str] = Counter()
        self._over = threading.Event()
        self._logs = LogTail([*self._specs, "supervisor"])
        self._cleanup = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._record()
            stack.enter_context(subreaper())
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                stack.callback(signal.signal, number, signal.signal(number, self._on_signal))
            stack.callback(self._start_guardian().communicate, DONE)
            stack.callback(self._record)
            stack.callback(self._stop_all)
            self._cleanup = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._cleanup.close()

    def run(self) -> None:
        """Returns when every job is done. Raises `ProcessDied`, the `error` of a late `Ready`, or `Interrupted`."""
        while not self._finished():
            for spec in self._due():
                self._start(spec)
            self._step()

    def _finished(self) -> bool:
        """Services alone run until somebody stops them."""
        jobs = [spec for spec in self._specs.values() if spec.kind is Kind.JOB]
        return bool(jobs) and all(self._is_done(spec) for spec in jobs)

    def _is_done(self, spec: ProcessSpec) -> bool:
        skipped = spec.name not in self._children and spec.creates is not None and spec.creates.exists()
        return spec.name in self._ended or skipped

    def _due(self) -> list[ProcessSpec]:
        waiting = [s for s in self._specs.values() if s.name not in self._children and not self._is_done(s)]
        return [spec for spec in waiting if all(self._is_reached(name) for name in spec.starts_after)]

    def _is_reached(self, name: str) -> bool:
        spec = self._specs[name]
        return name in self._ready if spec.kind is Kind.SERVICE else self._is_done(spec)

    def _start(self, spec: ProcessSpec) -> None:
        self._logs.follow(spec.name, spec.log)
        child = Child(spec, on_exit=self._events.put)
        self._children[spec.name] = child
        self._started[spec.name] = None
        self._record()
        self._say(f"started {spec.name} (pid {child.pid})")
        if spec.ready is None:
            self._ready.add(spec.name)
        else:
            threading.Thread(target=self._await_health, args=(spec.name, spec.ready), daemon=True).start()

    def _step(self) -> None:
        try:
            event = self._events.get(timeout=TICK_SECONDS)
        except queue.Empty:
            event = None
        self._show_news()
        match event:
            case Exited():
                self._on_exit(event)
            case _BecameReady(name) if name in self._children and name not in self._ended | self._ready:
                self._ready.add(name)
                self._say(f"{name} is ready after {self._children[name].seconds:.1f} s")
            case _Signalled(number):
                raise Interrupted(number)
        self._check_deadlines()

    def _on_exit(self, event: Exited) -> None:
        child = self._children.get(event.name)
        if child is None or event.pid != child.pid:
            return  # stopped by us
        if self._can_lose(event.name):
            return self._lose(event.name, event.told())
        if child.spec.kind is not Kind.JOB or event.code != 0:
            self._say(f"{event.name} (pid {child.pid}) {event.told()}; stopping the run")
            raise self._death(child, event)
        self._say(f"{event.name} is done after {child.seconds:.1f} s")
        self._stop(event.name)
        for name in [name for name in reversed(self._children) if self._specs[name].ends_with == event.name]:
            self._stop(name)

    def _can_lose(self, name: str) -> bool:
        """It was ready once, and enough others of its pool are."""
        pool = self._specs[name].pool
        if pool is None or not (name in self._ready or self._num_restarts[name]):
            return False
        others = self._ready & self._children.keys() & set(pool.names) - {name}
        return len(others) >= pool.min_alive

    def _lose(self, name: str, why: str) -> None:
        """The rest of its group ends too; then it is due again, unless that was often enough."""
        pool, pid = self._specs[name].pool, self._children[name].pid
        assert pool is not None
        self._stop(name)
        self._ready.discard(name)
        self._num_restarts[name] += 1
        again = self._num_restarts[name] <= pool.max_restarts
        if again:
            self._ended.discard(name)
        then = f"starting it again, {self._num_restarts[name]} of {pool.max_restarts}" if again else "going on without"
        self._say(f"{name} (pid {pid}) {why}; {then}")

    def _death(self, child: Child, event: Exited) -> ProcessDied:
        who = f"{event.name} (pid {child.pid})"
        died = ProcessDied(f"{who} {event.told()}, {child.seconds:.0f} s after its start; {_end_of_log(child)}")
        if event.code in OUR_EXIT_CODES:
            died.exit_code = event.code
        return died

    def _check_deadlines(self) -> None:
        for name, child in list(self._children.items()):
            ready = child.spec.ready
            if ready is not None and name not in self._ready and child.seconds > ready.timeout_seconds:
                if self._can_lose(name):
                    self._lose(name, f"was not ready after {ready.timeout_seconds:g} s")
                    continue
                raise ready.error(
                    f"{name} (pid {child.pid}) did not answer {ready.url} within {ready.timeout_seconds:g} s; "
                    f"{ready.remedy}; {_end_of_log(child)}"
                )

    def _stop(self, name: str, *, hurry: Callable[[], bool] = lambda: False) -> None:
        child = self._children[name]
        survivors = child.stop(grace_seconds=self._grace_seconds, hurry=hurry)
        if survivors:
            self._say(f"{name} left pids {survivors}, which SIGKILL did not end")
        del self._children[name]
        self._ended.add(name)
        self._record()
        last = self._logs.finish(name)
        if child.spec.kind is Kind.JOB:  # what a service says while it is stopped stays in its log
            for line in last:
                self._show(line)
        self._refresh()

    def _stop_all(self) -> None:
        """In reverse order of first start, each even if another could not be. Another Ctrl-C while this waits cuts
        every grace short."""
        self._over.set()
        signals = self._num_signals
        with ExitStack() as stops:
            for name in [name for name in self._started if name in self._children]:
                stops.callback(self._stop, name, hurry=lambda: self._num_signals > signals)

    def _show_news(self) -> None:
        for line in self._logs.poll():
            self._show(line)
        self._refresh()

    def _say(self, text: str) -> None:
        self._show(self._logs.prefixed("supervisor", text))

    def _record(self) -> None:
        records = [child.record() for child in self._children.values()]
        state: Mapping[str, Any] = {"supervisor": os.getpid(), "processes": records}
        write_atomically(self._folder / PROCESSES_FILE, json.dumps(state, indent=2) + "\n")

    def _start_guardian(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-m", "syncline.launch.guardian", str(self._folder / PROCESSES_FILE)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
            pass_fds=() if self._lock_fd is None else (self._lock_fd,),
        )

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        """`SimpleQueue.put` may be called from a signal handler; ordinary queues may not."""
        self._num_signals += 1
        self._events.put(_Signalled(number))

    def _await_health(self, name: str, ready: Ready) -> None:
        while not self._over.wait(HEALTH_SECONDS):
            if answers(ready.url):
                self._events.put(_BecameReady(name))
                return


def _end_of_log(child: Child) -> str:
    lines = "".join(f"\n  | {line}" for line in last_lines(child.spec.log, LAST_LINES))
    return f"its log {child.spec.log} ends with:{lines or ' (nothing)'}"


def answers(url: str) -> bool:
    """Whether a GET is answered with 200. Straight to the host: a proxy of the environment is not asked."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=HEALTH_TIMEOUT_SECONDS)
    try:
        connection.request("GET", parts.path)
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
