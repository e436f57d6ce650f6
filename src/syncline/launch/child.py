"""One process of a run while it lives: its pid, its group, its log, and how it ended.

A thread waits for the end and reports it at once, but leaves the process unreaped: a zombie keeps its pid, so the
group can be signalled without ever meeting a stranger. `stop` reaps, after the group is empty.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from syncline.config.rules import LOOPBACK
from syncline.launch import tether
from syncline.launch.groups import process_stat, stop_group
from syncline.launch.plan import ProcessSpec

PROXIES = ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY")


@dataclass(frozen=True, slots=True)
class Exited:
    """`code` is the exit code; negative, the signal that killed it, as `subprocess` counts."""

    name: str
    code: int
    pid: int

    def told(self) -> str:
        if self.code >= 0:
            return f"exited with code {self.code}"
        number = -self.code
        name = signal.Signals(number).name if number in set(signal.Signals) else "an unnamed signal"
        hint = "; if nobody did that, the machine may have run out of memory" if number == signal.SIGKILL else ""
        return f"was killed by {name} (signal {number}){hint}"


class Child:
    """A started process. Start it from the main thread: the tether holds to the thread, not to the process."""

    def __init__(self, spec: ProcessSpec, *, on_exit: Callable[[Exited], None]) -> None:
        """`on_exit` is called from the watching thread, once."""
        self.spec = spec
        self.started = time.monotonic()
        self._process = _spawn(spec)
        self.pid = self._process.pid
        stat = process_stat(self.pid)
        assert stat is not None, "an unreaped child has a stat"
        self.start_time = stat.start_time
        self._watch = threading.Thread(target=self._wait, args=(on_exit,), name=f"watch-{spec.name}", daemon=True)
        self._watch.start()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    def record(self) -> dict[str, Any]:
        """What another process needs to find, and not to mistake, this one."""
        return {
            "name": self.spec.name,
            "pid": self.pid,
            "start_time": self.start_time,
            "argv": list(self.spec.argv),
            "log": str(self.spec.log),
        }

    def stop(self, *, grace_seconds: float, hurry: Callable[[], bool] = lambda: False) -> list[int]:
        """Ends the whole group and reaps it. Returns the pids that not even SIGKILL ended."""
        survivors = stop_group(self.pid, self.start_time, grace_seconds=grace_seconds, hurry=hurry)
        if self.pid in survivors:
            return survivors
        self._watch.join()
        self._process.wait()
        with suppress(ChildProcessError):  # grandchildren whose parents died come to us, the subreaper
            while os.waitpid(-self.pid, os.WNOHANG) != (0, 0):
                pass
        return survivors

    def _wait(self, on_exit: Callable[[Exited], None]) -> None:
        end = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
        assert end is not None, "waitid without WNOHANG waits"
        code = end.si_status if end.si_code == os.CLD_EXITED else -end.si_status
        on_exit(Exited(self.spec.name, code, self.pid))


def _spawn(spec: ProcessSpec) -> subprocess.Popen[bytes]:
    spec.log.parent.mkdir(parents=True, exist_ok=True)
    tethered = [sys.executable, "-I", "-S", str(Path(tether.__file__)), str(os.getpid()), *spec.argv]
    environment: Mapping[str, str] = {**os.environ, **_direct(os.environ), **spec.env}
    with spec.log.open("ab") as log:
        return subprocess.Popen(
            tethered,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _direct(environ: Mapping[str, str]) -> dict[str, str]:
    """A run's processes speak to each other past the proxy of the environment, which reaches a loopback of its own."""
    if not any(environ.get(name) for name in PROXIES):
        return {}
    kept = environ.get("no_proxy") or environ.get("NO_PROXY")
    return dict.fromkeys(("no_proxy", "NO_PROXY"), ",".join([*([kept] if kept else []), *LOOPBACK]))
