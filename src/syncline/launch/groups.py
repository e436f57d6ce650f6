"""Process groups of a run: who is alive in them, and how they are stopped, by pid and start time only.

Every process of a run leads its own session and group, so whatever it spawns stays in that group. Standard library
only: the guardian uses it too, and must start fast.
"""

import ctypes
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

POLL_SECONDS = 0.02
KILL_SECONDS = 10.0
"""How long the kernel may take to end a group after SIGKILL before we say so."""
_PR_SET_CHILD_SUBREAPER = 36


@dataclass(frozen=True, slots=True)
class Stat:
    """What the kernel says of a process. `start_time`, in clock ticks since boot, and the pid name one process."""

    pid: int
    group: int
    zombie: bool
    start_time: int


def process_stat(pid: int) -> Stat | None:
    """`None` when there is no such process, or it is hidden from us, which ours never are."""
    try:
        content = Path(f"/proc/{pid}/stat").read_bytes()  # of its name the kernel keeps 15 bytes, cut anywhere
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return None
    after_name = content.rpartition(b")")[2].decode().split()
    return Stat(pid, group=int(after_name[2]), zombie=after_name[0] in "ZX", start_time=int(after_name[19]))


def live_members(group: int) -> list[int]:
    """Pids in the group that still run; zombies are dead."""
    stats = (process_stat(int(path.name)) for path in Path("/proc").glob("[0-9]*"))
    return [stat.pid for stat in stats if stat is not None and stat.group == group and not stat.zombie]


def is_ours(leader: int, start_time: int) -> bool:
    """Whether the group of `leader` is still the one we started.

    A dead leader's group keeps its number from being used again as long as it has members.
    """
    stat = process_stat(leader)
    return stat is None or stat.start_time == start_time


def stop_group(
    leader: int, start_time: int, *, grace_seconds: float, hurry: Callable[[], bool] = lambda: False
) -> list[int]:
    """SIGTERM, then SIGKILL after the grace, or as soon as `hurry()`. Returns the pids that survived even that."""
    for number, seconds in ((signal.SIGTERM, grace_seconds), (signal.SIGKILL, KILL_SECONDS)):
        if not is_ours(leader, start_time) or not live_members(leader):
            return []
        with suppress(ProcessLookupError):
            os.killpg(leader, number)
        deadline = time.monotonic() + seconds
        while live_members(leader) and time.monotonic() < deadline:
            if number == signal.SIGTERM and hurry():
                break
            time.sleep(POLL_SECONDS)
    return live_members(leader)


@contextmanager
def subreaper() -> Iterator[None]:
    """Within, orphans among this process's descendants become its children, so that it can reap them."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")
    try:
        yield
    finally:
        libc.prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
