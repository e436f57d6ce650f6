"""A measurement that fails, dies or hangs costs itself alone, and what it had told is kept."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from syncline.bench.apart import Outcome, take, tell, watch

NAMES = ("good", "failing", "broken", "dying", "also good", "hanging", "last")


class Full(Exception):
    pass


def fail() -> dict[str, Any]:
    raise Full("no room\nfor this")


def break_down() -> dict[str, Any]:
    raise ValueError("no more of this process")


def hang(told: Path) -> dict[str, Any]:
    tell(told, {"name": "hanging", "so_far": {"value": 0}})
    time.sleep(60)
    return {}


def measurements(told: Path) -> dict[str, Any]:
    return {
        "good": lambda: {"value": os.getsid(0) == os.getpid()},
        "failing": fail,
        "broken": break_down,
        "dying": lambda: os._exit(9),
        "also good": lambda: {"value": 2},
        "hanging": lambda: hang(told),
        "last": lambda: {"value": 3},
    }


def watched(told: Path, names: tuple[str, ...], *, deadline: float, outcome: Outcome | None = None) -> Outcome:
    def command(left: Any) -> list[str]:
        return [sys.executable, __file__, str(told), json.dumps(left)]

    outcome = outcome or Outcome()
    watch(names, command, told, outcome=outcome, seconds_each=2.0, deadline=deadline)
    return outcome


def test_the_others_are_measured_all_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outcome = watched(tmp_path / "told", NAMES, deadline=time.monotonic() + 120)
    assert outcome.results == {"good": {"value": True}, "also good": {"value": 2}, "last": {"value": 3}}
    assert outcome.faults == {
        "failing": "Full: no room",
        "broken": "ValueError: no more of this process",
        "dying": "its process ended with exit code 9",
        "hanging": "ended after 2 s",
    }
    assert outcome.so_far == {"hanging": {"value": 0}}
    assert capsys.readouterr().out.splitlines()[0] == "good: done"


def test_at_the_deadline_what_is_known_is_all_there_is(tmp_path: Path) -> None:
    outcome = watched(tmp_path / "told", ("good", "last"), deadline=time.monotonic())
    assert outcome.results == {}
    assert set(outcome.faults.values()) == {"left out: the deadline had come"}


@pytest.fixture
def interruptible() -> Iterator[None]:
    """SIGINT raises, also where these tests were started in a shell's background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_interrupted_what_is_known_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGINT comes once the first has ended and the second hangs."""
    read, outcome, told = Outcome.take, Outcome(), tmp_path / "told"

    def take_and_end(self: Outcome, line: dict[str, Any]) -> None:
        read(self, line)
        if "so_far" in line and "hanging" not in self.faults:
            monkeypatch.setattr(Outcome, "take", read)
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Outcome, "take", take_and_end)
    with pytest.raises(KeyboardInterrupt):
        watched(told, ("good", "hanging", "last"), deadline=time.monotonic() + 120, outcome=outcome)
    assert outcome.results == {"good": {"value": True}}
    assert (outcome.so_far, outcome.faults) == ({"hanging": {"value": 0}}, {"hanging": "interrupted"})
    assert outcome.missing(["last"]) == ["last"]


def test_a_process_began_before_its_imports() -> None:
    before = time.monotonic()
    code = "import torch; from syncline.bench.apart import process_start; print(process_start())"
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    begun = time.monotonic()
    printed, _ = child.communicate()
    assert before - 0.02 <= float(printed) <= begun


if __name__ == "__main__":
    take(measurements(Path(sys.argv[1])), json.loads(sys.argv[2]), Path(sys.argv[1]), (Full,))
