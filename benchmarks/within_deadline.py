"""Waits for a run until a deadline, Ctrl-C, SIGTERM or its own end, so that a benchmark always prints what is known.

`wait` asks the run to end and gives it time to; another signal meanwhile is passed on, for it to hurry. None of them
ends the benchmark itself, which has its table to print.
"""

import signal
import subprocess
import sys
import time
from collections.abc import Callable

GRACE_SECONDS = 60.0
HURRY_SECONDS = 10.0
POLL_SECONDS = 0.1
INTERRUPTED = "interrupted"
DEADLINE = "the deadline had come"
SIGNALS = (signal.SIGINT, signal.SIGTERM)


def wait(run: "subprocess.Popen[bytes]", *, until: float, enough: Callable[[], bool] = lambda: False) -> str | None:
    """Why the run was ended; `None` where it ended by itself, or because `enough`, which is asked all the time, said
    so. `until` is of `time.monotonic`. Once interrupted, the caller hears neither signal any more: what is left to it
    takes no time."""
    asked: list[int] = []
    before = {number: signal.signal(number, lambda number, _: asked.append(number)) for number in SIGNALS}
    try:
        done = enough()
        while run.poll() is None and not asked and not done and time.monotonic() < until:
            time.sleep(POLL_SECONDS)
            done = enough()
        if run.poll() is not None:
            return INTERRUPTED if asked else None
        why = INTERRUPTED if asked else None if done else DEADLINE
        print(f"ending the run: {why or 'it has done enough'}", file=sys.stderr, flush=True)
        _end(run, asked)
        return INTERRUPTED if asked else why
    finally:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN if asked else before[number])


def _end(run: "subprocess.Popen[bytes]", asked: list[int]) -> None:
    heard, until = len(asked), time.monotonic() + GRACE_SECONDS
    run.send_signal(signal.SIGINT)
    while run.poll() is None and time.monotonic() < until:
        if len(asked) > heard:
            heard, until = len(asked), min(until, time.monotonic() + HURRY_SECONDS)
            run.send_signal(signal.SIGINT)
        time.sleep(POLL_SECONDS)
    if run.poll() is None:
        run.kill()
        run.wait()
