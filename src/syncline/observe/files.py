"""Reads what a run wrote: the files other modules show, summarise and follow."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

BEFORE_FILE = "evaluation-before.json"
AFTER_FILE = "evaluation-after.json"
ENGINE_FILE = "engine.json"
CONFIG_FILE = "config.yaml"


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Every complete line of a JSONL file; no file is no lines. A last line still being written is left out."""
    if not path.exists():
        return []
    whole, _, _ = path.read_text(encoding="utf-8").rpartition("\n")
    return [json.loads(line) for line in whole.splitlines() if line]


def read_object(path: Path) -> dict[str, Any] | None:
    """A JSON file's object, or `None` when the run did not write it."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def write_atomically(path: Path, text: str) -> Path:
    """Writes beside, then renames: a reader finds the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)
    return path


def series(rows: Sequence[Mapping[str, Any]], name: str) -> list[tuple[int, float]]:
    """`(step, value)` of each step that measured `name`."""
    return [(row["step"], row[name]) for row in rows if row.get(name) is not None]


def loop_tokens_per_second(row: Mapping[str, Any]) -> float | None:
    """Tokens sampled and trained on in a step over the whole step's seconds: what the run as a whole achieves."""
    tokens, seconds = row.get("tokens/sampled"), row.get("time/step_seconds")
    return tokens / seconds if tokens is not None and seconds else None


class LineFollower:
    """Gives the complete lines appended to a file since the last call, as `tail -F` does.

    The file may not exist yet. A file that got shorter was cut by its writer, and is followed from its new end.
    """

    def __init__(self, path: Path, *, from_end: bool = False) -> None:
        self._path = path
        self._offset = path.stat().st_size if from_end and path.exists() else 0
        self._partial = b""

    def poll(self) -> list[str]:
        """The new lines, without their newline; bytes that are not UTF-8 are shown as escapes."""
        try:
            with self._path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size < self._offset:
                    self._offset, self._partial = size, b""
                file.seek(self._offset)
                new = file.read()
        except FileNotFoundError:
            return []
        self._offset += len(new)
        *lines, self._partial = (self._partial + new).split(b"\n")
        return [line.decode("utf-8", errors="backslashreplace").rstrip("\r") for line in lines]

    def rest(self) -> list[str]:
        """The new lines and, at the end of its writer's life, the last one that no newline ended."""
        lines = self.poll()
        last, self._partial = self._partial, b""
        return [*lines, last.decode("utf-8", errors="backslashreplace")] if last else lines


def last_lines(path: Path, count: int) -> list[str]:
    """The end of a log, for an error message. Reads at most 64 KiB."""
    if not path.exists():
        return []
    with path.open("rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - (64 << 10)))
        text = file.read().decode("utf-8", errors="backslashreplace")
    return [line for line in text.splitlines() if line.strip()][-count:]
