"""A benchmark's run is ended at its deadline or by a signal, and the benchmark goes on to its table in any case."""

import signal
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import within_deadline
from within_deadline import DEADLINE, INTERRUPTED, wait


class Run:
    """Ends with the `last`th SIGINT, or when killed. `on_signal` is what reaches the benchmark at each."""

    def __init__(self, *, last: int, on_signal: tuple[signal.Signals, ...] = ()) -> None:
        self.told: list[str] = []
        self._last = last
        self._on_signal = list(on_signal)

    def poll(self) -> int | None:
        return 0 if "killed" in self.told or self.told.count("SIGINT") >= self._last else None

    def send_signal(self, number: int) -> None:
        self.told.append(signal.Signals(number).name)
        if self._on_signal:
            signal.raise_signal(self._on_signal.pop(0))

    def kill(self) -> None:
        self.told.append("killed")

    def wait(self) -> int:
        return 0


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    now = SimpleNamespace(seconds=0.0)

    def sleep(seconds: float) -> None:
        now.seconds += seconds

    monkeypatch.setattr(within_deadline, "time", SimpleNamespace(monotonic=lambda: now.seconds, sleep=sleep))
    before = {number: signal.getsignal(number) for number in within_deadline.SIGNALS}
    yield now
    for number, handler in before.items():
        signal.signal(number, handler)


def ended(run: Any, *, until: float = 100.0, arriving: signal.Signals | None = None) -> str | None:
    def arrives() -> bool:
        if arriving:
            signal.raise_signal(arriving)
        return False

    return wait(run, until=until, enough=arrives)


def test_a_run_that_ends_by_itself_leaves_signals_as_they_were() -> None:
    before = signal.getsignal(signal.SIGTERM)
    assert ended(Run(last=0)) is None
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_deadline_ends_the_run_and_kills_one_that_will_not(clock: SimpleNamespace) -> None:
    run = Run(last=1)
    assert (ended(run, until=5.0), run.told) == (DEADLINE, ["SIGINT"])
    stubborn = Run(last=9)
    assert (ended(stubborn, until=0.0), stubborn.told) == (DEADLINE, ["SIGINT", "killed"])
    assert clock.seconds == pytest.approx(65, abs=1)


def test_a_run_that_has_done_enough_is_ended_without_a_fault(clock: SimpleNamespace) -> None:
    run = Run(last=1)
    assert wait(run, until=9.0, enough=lambda: clock.seconds > 5) is None  # type: ignore[arg-type]
    assert run.told == ["SIGINT"]
    assert clock.seconds == pytest.approx(5, abs=0.5)


@pytest.mark.parametrize("number", within_deadline.SIGNALS)
def test_a_signal_ends_the_run_and_not_the_benchmark(number: signal.Signals) -> None:
    run = Run(last=1)
    assert (ended(run, arriving=number), run.told) == (INTERRUPTED, ["SIGINT"])
    signal.raise_signal(number)  # while the table is printed


@pytest.mark.parametrize("number", within_deadline.SIGNALS)
def test_a_second_signal_makes_the_run_hurry(number: signal.Signals, clock: SimpleNamespace) -> None:
    run = Run(last=2, on_signal=(number,))
    assert (ended(run, arriving=signal.SIGINT), run.told) == (INTERRUPTED, ["SIGINT", "SIGINT"])
    stubborn = Run(last=9, on_signal=(number, number))
    assert ended(stubborn, until=0.0) == INTERRUPTED
    assert stubborn.told == ["SIGINT"] * 3 + ["killed"]
    assert clock.seconds == pytest.approx(10, abs=1)
