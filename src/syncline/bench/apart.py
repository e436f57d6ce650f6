"""Measurements one after the other in a process of their own, so that one that fails, hangs or dies costs itself alone.

The child is this same program, told which to take; it appends a line to a file when it begins one and one when it has
ended it. Who waits: the parent, polling that file. Who unblocks: a new line, the child's end, the time a measurement
may take (starting the child is none), or the deadline of all, at which what is known is all there is. A child that died
or was ended is followed by one that begins after the measurement at fault.
"""

import json
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

POLL_SECONDS = 0.2
Measure = Callable[[], dict[str, Any]]


@dataclass(slots=True)
class Outcome:
    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What each measurement returned, by its name."""
    faults: dict[str, str] = field(default_factory=dict)
    """Why the others returned nothing."""

    def take(self, line: dict[str, Any]) -> None:
        (self.results if "result" in line else self.faults)[line["name"]] = line.get("result") or line["fault"]

    def missing(self, names: Sequence[str]) -> list[str]:
        return [name for name in names if name not in self.results and name not in self.faults]


def take(
    measurements: Mapping[str, Measure], names: Sequence[str], told: Path, failing: tuple[type[Exception], ...]
) -> None:
    """The child's part: what it was asked for, in order. Faults of the types `failing` are told, others end it."""
    for name in names:
        _tell(told, {"name": name, "began": True})
        try:
            _tell(told, {"name": name, "result": measurements[name]()})
        except failing as error:
            _tell(told, {"name": name, "fault": f"{type(error).__name__}: {error}".splitlines()[0][:160]})


def watch(
    names: Sequence[str],
    command: Callable[[Sequence[str]], list[str]],
    told: Path,
    *,
    seconds_each: float,
    deadline: float,
) -> Outcome:
    """The parent's part. `command` of some names starts a child that takes these; `deadline` is `time.monotonic`'s."""
    outcome = Outcome()
    while (left := outcome.missing(names)) and time.monotonic() < deadline:
        told.write_text("")
        child = subprocess.Popen(command(left))
        try:
            fault = _until_over(child, told, outcome, seconds_each=seconds_each, deadline=deadline)
        finally:
            child.kill()
            child.wait()
        _read(told, outcome)
        if still := outcome.missing(left):
            outcome.faults[still[0]] = fault
    outcome.faults |= dict.fromkeys(outcome.missing(names), "left out: the deadline had come")
    return outcome


def _until_over(
    child: "subprocess.Popen[bytes]", told: Path, outcome: Outcome, *, seconds_each: float, deadline: float
) -> str:
    """Why the child takes no more; of the measurement it was at, if any, that is the fault."""
    lines, since = 0, time.monotonic()
    while child.poll() is None:
        if (count := _read(told, outcome)) != lines:
            lines, since = count, time.monotonic()
        if time.monotonic() > deadline:
            return "ended: the deadline had come"
        if lines and time.monotonic() - since > seconds_each:
            return f"ended after {seconds_each:.0f} s"
        time.sleep(POLL_SECONDS)
    return f"its process ended with exit code {child.returncode}"


def _read(told: Path, outcome: Outcome) -> int:
    """Takes in what was told so far; returns the number of lines."""
    lines = told.read_text().split("\n")[:-1]  # the last may be half written
    for line in map(json.loads, lines):
        if "began" not in line and line["name"] not in outcome.results:
            outcome.take(line)
            print(f"{line['name']}: {line.get('fault') or 'done'}", flush=True)
    return len(lines)


def _tell(told: Path, line: dict[str, Any]) -> None:
    with told.open("a") as file:
        file.write(json.dumps(line) + "\n")
