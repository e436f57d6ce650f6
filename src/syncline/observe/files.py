"""Reads what a run wrote: the files other modules show, summarise and follow."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BEFORE_FILE = "evaluation-before.json"
AFTER_FILE = "evaluation-after.json"
ENGINE_FILE = "engine.json"
CONFIG_FILE = "config.yaml"
PROCESSES_FILE = "processes.json"


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Every complete line of a JSONL file; no file is no lines. A last line still being written is left out."""
    if not path.exists():
        return []
    whole, _, _ = path.read_text(encoding="utf-8").rpartition("\n")
    return [json.loads(line) for line in whole.splitlines() if line]


def text_lines(path: Path) -> list[str]:
    """Of a file that anybody may have written: a newline alone ends a line, since a text may hold a U+2028, and a byte
    order mark is not of the first. An empty file has one empty line."""
    return path.read_text(encoding="utf-8-sig").removesuffix("\n").split("\n")


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


class NotALine(ValueError):
    """An offset is not where a line begins: the file was cut since, or it never was."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Whole lines of a file, unparsed, and where in it they lie, in bytes."""

    lines: list[bytes]
    start: int
    end: int


def lines_after(path: Path, offset: int, *, max_bytes: int) -> Piece:
    """The complete lines from `offset` on: about `max_bytes` of them, at least one. No file is an empty one. Raises
    `NotALine`."""
    if not path.exists():
        return Piece([], 0, 0)
    with path.open("rb") as file:
        file.seek(max(0, offset - 1))
        if offset and file.read(1) != b"\n":
            raise NotALine(f"{path.name} has no line that begins at byte {offset}")
        text = file.read(max_bytes)
        if b"\n" not in text:
            text += file.readline()
    text = text[: text.rfind(b"\n") + 1]
    return Piece(text.split(b"\n")[:-1], offset, offset + len(text))


def lines_before(path: Path, offset: int | None, *, max_bytes: int) -> Piece:
    """The complete lines that end before `offset`, or at the end of the file; about `max_bytes`, at least one."""
    if not path.exists():
        return Piece([], 0, 0)
    with path.open("rb") as file:
        end = os.fstat(file.fileno()).st_size
        end = end if offset is None else min(offset, end)
        start = max(0, end - max_bytes)
        file.seek(start)
        text = file.read(end - start)
        while start and b"\n" not in text[: text.rfind(b"\n")]:
            grown = max(0, start - max_bytes)
            file.seek(grown)
            text, start = file.read(start - grown) + text, grown
    first = text.find(b"\n") + 1 if start else 0
    whole = text[first : text.rfind(b"\n") + 1]
    return Piece(whole.split(b"\n")[:-1], start + first, start + first + len(whole))


def newest_object(path: Path) -> dict[str, Any] | None:
    """What the last complete line of a JSONL file says, or `None`."""
    lines = lines_before(path, None, max_bytes=64 << 10).lines
    return json.loads(lines[-1]) if lines else None


def last_lines(path: Path, count: int) -> list[str]:
    """The end of a log, for an error message. Reads at most 64 KiB."""
    if not path.exists():
        return []
    with path.open("rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - (64 << 10)))
        text = file.read().decode("utf-8", errors="backslashreplace")
    return [line for line in text.splitlines() if line.strip()][-count:]
