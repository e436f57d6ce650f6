"""A signal ends the learner between two steps: what is trained is saved, nothing is half done.

Who waits: the loop, for the next batch, inside of `StopRequest.here`. Who unblocks: SIGINT or SIGTERM, which raise
`Stopped` there and nowhere else; one that comes in the middle of a step is remembered until the loop is there again.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from syncline.errors import SynclineError

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(SynclineError):
    """Somebody asked the learner to stop. The exit code follows the shell: 128 + signal."""

    def __init__(self, number: int) -> None:
        self.exit_code = 128 + number
        super().__init__(f"stopped by {signal.Signals(number).name}; go on from the last checkpoint with --resume")


class StopRequest:
    def __init__(self) -> None:
        self._asked: int | None = None
        self._is_here = False

    @contextmanager
    def listening(self) -> Iterator["StopRequest"]:
        """Catches the signals, in the main thread, until it is left."""
        before = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def here(self) -> Iterator[None]:
        """Where the loop may be stopped. Raises `Stopped`."""
        self._is_here = True
        try:
            if self._asked is not None:
                raise Stopped(self._asked)
            yield
        finally:
            self._is_here = False

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._asked = number
        if self._is_here:
            raise Stopped(number)
