"""A measurement that fails, dies or hangs costs itself alone."""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from syncline.bench.apart import Outcome, take, watch

NAMES = ("good", "failing", "dying", "also good", "hanging", "last")


class Full(Exception):
    pass


def fail() -> dict[str, Any]:
    raise Full("no room\nfor this")


def measurements() -> dict[str, Any]:
    return {
        "good": lambda: {"value": 1},
        "failing": fail,
        "dying": lambda: os._exit(9),
        "also good": lambda: {"value": 2},
        "hanging": lambda: time.sleep(60) or {},
        "last": lambda: {"value": 3},
    }


def watched(told: Path, names: tuple[str, ...], *, deadline: float) -> Outcome:
    def command(left: Any) -> list[str]:
        return [sys.executable, __file__, str(told), json.dumps(left)]

    return watch(names, command, told, seconds_each=2.0, deadline=deadline)


def test_the_others_are_measured_all_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outcome = watched(tmp_path / "told", NAMES, deadline=time.monotonic() + 120)
    assert outcome.results == {"good": {"value": 1}, "also good": {"value": 2}, "last": {"value": 3}}
    assert outcome.faults == {
        "failing": "Full: no room",
        "dying": "its process ended with exit code 9",
        "hanging": "ended after 2 s",
    }
    assert capsys.readouterr().out.splitlines()[0] == "good: done"


def test_at_the_deadline_what_is_known_is_all_there_is(tmp_path: Path) -> None:
    outcome = watched(tmp_path / "told", ("good", "last"), deadline=time.monotonic())
    assert outcome.results == {}
    assert set(outcome.faults.values()) == {"left out: the deadline had come"}


if __name__ == "__main__":
    take(measurements(), json.loads(sys.argv[2]), Path(sys.argv[1]), (Full,))
