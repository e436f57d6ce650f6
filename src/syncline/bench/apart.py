"""Measurements one after the other in a process of their own, so that one that fails, hangs or dies costs itself alone.

The child is this same program, told which to take; it appends a line to a file when it begins one, when it knows
something of it, and when it has ended it. Who waits: the parent, polling that file. Who unblocks: a new line, the
child's end, the time a measurement may take (starting the child is none), the deadline of all, or SIGINT, which raises
`KeyboardInterrupt` here; what is known is all there is then. A child that died or was ended is followed by one that
begins after the measurement at fault.
"""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from syncline.launch.groups import process_stat

POLL_SECONDS = 0.2
Measure = Callable[[], dict[str, Any]]


@dataclass(slots=True)
class Outcome:
    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What each measurement returned, by its name."""
    faults: dict[str, str] = field(default_factory=dict)
    """Why the others returned nothing."""
    so_far: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What a measurement had told last before it was over."""

    def take(self, line: dict[str, Any]) -> None:
        for kind, found in (("result", self.results), ("fault", self.faults), ("so_far", self.so_far)):
            if kind in line:
                found[line["name"]] = line[kind]

    def missing(self, names: Sequence[str]) -> list[str]:
        return [name for name in names if name not in self.results and name not in self.faults]


def take(
    measurements: Mapping[str, Measure], names: Sequence[str], told: Path, failing: tuple[type[Exception], ...]
) -> None:
    """The child's part: what it was asked for, in order. After faults of the types `failing` it goes on; others are
    told and end it, because what they left behind may spoil the next."""
    for name in names:
        tell(told, {"name": name, "began": True})
        try:
            tell(told, {"name": name, "result": measurements[name]()})
        except Exception as error:
            tell(told, {"name": name, "fault": f"{type(error).__name__}: {error}".splitlines()[0][:160]})
            if not isinstance(error, failing):
                raise


def watch(
    names: Sequence[str],
    command: Callable[[Sequence[str]], list[str]],
    told: Path,
    *,
    outcome: Outcome,
    seconds_each: float,
    deadline: float,
) -> None:
    """The parent's part, which fills `outcome`. `command` of some names starts a child that takes these; `deadline` is
    `time.monotonic`'s."""
    while (left := outcome.missing(names)) and time.monotonic() < deadline:
        told.write_text("")
        child = subprocess.Popen(command(left), start_new_session=True)
        fault = "interrupted"
        try:
            fault = _until_over(child, told, outcome, seconds_each=seconds_each, deadline=deadline)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            lines = _read(told, outcome)
            at_fault = lines[-1]["name"] if lines else left[0]
            if at_fault in outcome.missing(left):
                outcome.faults[at_fault] = fault
    outcome.faults |= dict.fromkeys(outcome.missing(names), "left out: the deadline had come")


def tell(told: Path, line: dict[str, Any]) -> None:
    """Adds a line: of a measurement's name, and what is known of it `so_far`, say."""
    with told.open("a") as file:
        file.write(json.dumps(line) + "\n")


def process_start() -> float:
    """When this process began, its imports included, on `time.monotonic`'s clock."""
    stat = process_stat(os.getpid())
    assert stat is not None, "this process runs"
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - stat.start_time / os.sysconf("SC_CLK_TCK")
    return time.monotonic() - age


def _until_over(
    child: "subprocess.Popen[bytes]", told: Path, outcome: Outcome, *, seconds_each: float, deadline: float
) -> str:
    """Why the child takes no more; of the measurement it was at, if any, that is the fault."""
    lines, since = 0, time.monotonic()
    while child.poll() is None:
        if (count := sum("so_far" not in line for line in _read(told, outcome))) != lines:
            lines, since = count, time.monotonic()
        if time.monotonic() > deadline:
            return "ended: the deadline had come"
        if lines and time.monotonic() - since > seconds_each:
            return f"ended after {seconds_each:.0f} s"
        time.sleep(POLL_SECONDS)
    return f"its process ended with exit code {child.returncode}"


def _read(told: Path, outcome: Outcome) -> list[dict[str, Any]]:
    """Takes in what was told so far; returns all of it."""
    lines = [json.loads(line) for line in told.read_text().split("\n")[:-1]]  # the last may be half written
    for line in lines:
        if line["name"] in outcome.results or line["name"] in outcome.faults:
            continue
        outcome.take(line)
        if "result" in line or "fault" in line:
            print(f"{line['name']}: {line.get('fault') or 'done'}", flush=True)
    return lines
