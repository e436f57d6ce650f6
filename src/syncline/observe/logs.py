"""Logs of a run: one format in every process, one file a process, and one terminal that shows them all by name."""

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from syncline.observe.files import LineFollower

FORMAT = "%(asctime)s | %(levelname)s | %(name)s | %(message)s"


def set_up_logging(level: int = logging.INFO) -> None:
    """This process logs to stderr, which its supervisor keeps in a file. Called once, by a verb."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(FORMAT))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    for chatty in ("httpx", "httpcore", "urllib3", "filelock"):
        logging.getLogger(chatty).setLevel(logging.WARNING)


def log_path(run_dir: Path, name: str) -> Path:
    """Where the process `name` logs: `env:arithmetic` → `logs/env-arithmetic.log`."""
    return run_dir / "logs" / (name.replace(":", "-").replace("/", "-") + ".log")


class LogTail:
    """Follows the logs of several processes; each new line comes with its process's name, padded to one width."""

    def __init__(self, names: Sequence[str]) -> None:
        self._followers: dict[str, LineFollower] = {}
        self._width = max((len(name) for name in names), default=0)

    def follow(self, name: str, path: Path) -> None:
        """From the end of what is there: an earlier run's lines are not shown again."""
        self._followers[name] = LineFollower(path, from_end=True)

    def poll(self) -> list[str]:
        return [self.prefixed(name, line) for name, f in self._followers.items() for line in f.poll()]

    def finish(self, name: str) -> list[str]:
        """The last lines of a process that has ended."""
        follower = self._followers.pop(name, None)
        return [self.prefixed(name, line) for line in follower.rest()] if follower else []

    def prefixed(self, name: str, line: str) -> str:
        return f"{name:<{self._width}} | {line}"
