"""Waits for a run until a deadline, Ctrl-C or its own end, so that a benchmark always prints what is known by then."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable

GRACE_SECONDS = 60.0
POLL_SECONDS = 0.1
INTERRUPTED = "interrupted"
DEADLINE = "the deadline had come"


def wait(run: "subprocess.Popen[bytes]", *, until: float, meanwhile: Callable[[], None] = lambda: None) -> str | None:
    """Why the run was ended, `None` where it ended by itself. `until` is of `time.monotonic`."""
    why = None
    try:
        while run.poll() is None and time.monotonic() < until:
            meanwhile()
            time.sleep(POLL_SECONDS)
        why = DEADLINE if run.poll() is None else None
    except KeyboardInterrupt:
        why = INTERRUPTED
    if run.poll() is None:
        print(f"ending the run: {why}", file=sys.stderr, flush=True)
        run.send_signal(signal.SIGINT)
        try:
            run.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            run.kill()
            run.wait()
    return why
