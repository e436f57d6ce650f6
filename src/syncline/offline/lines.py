"""JSON lines that survive a `kill -9`: what `append` has returned from is on disk, and no line is there twice.

A record is known by its key. Whoever opens the file again learns which keys are done and does the others; a last line
that was torn by the crash is cut off, so its work is done once more. One writer at a time: a second is refused.
"""

import fcntl
import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from syncline.errors import ConfigError

Record = Mapping[str, Any]


class AppendOnlyLines:
    """`with AppendOnlyLines(path, key="key") as lines`: `lines.done` holds the keys on disk, `lines.append` adds.

    `key` names a record's field or makes its key. Raises `ConfigError` for a line that is not JSON, a key that is
    there twice, and a file another process appends to.
    """

    def __init__(self, path: Path, *, key: str | Callable[[Record], str]) -> None:
        self.path = path
        self._key: Callable[[Record], str] = key if callable(key) else lambda record: record[key]
        self.done: set[str] = set()

    def __enter__(self) -> Self:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("a+b")
        try:
            self._lock()
            self._take_stock()
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def append(self, *records: Record) -> None:
        """On disk when this returns: one write and one fsync however many. A key that is done already is refused."""
        keys = [self._key(record) for record in records]
        twice = [key for i, key in enumerate(keys) if key in self.done or key in keys[:i]]
        if twice:
            raise ValueError(f"{self.path}: {twice[0]!r} is there already")
        self._file.write("".join(json.dumps(record, allow_nan=False) + "\n" for record in records).encode())
        self._file.flush()
        os.fsync(self._file.fileno())
        self.done.update(keys)

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError([f"{self.path}: another process appends to it; wait for its end or stop it"]) from error

    def _take_stock(self) -> None:
        """Reads the keys of whole lines and cuts off what follows the last newline."""
        self._file.seek(0)
        end = 0
        for number, line in enumerate(self._file, start=1):
            if not line.endswith(b"\n"):
                self._file.truncate(end)
                break
            end += len(line)
            record = parse_line(line, where=f"{self.path}:{number}")
            try:
                key = self._key(record)
            except KeyError as error:
                raise ConfigError([f"{self.path}:{number}: has no {error}; remove the line"]) from error
            if key in self.done:
                raise ConfigError([f"{self.path}:{number}: {key!r} is there twice; remove one of the two lines"])
            self.done.add(key)


def read_records(path: Path) -> Iterable[tuple[str, dict[str, Any]]]:
    """Pairs of where a line stands (`rollouts.jsonl:3`) and its object. Raises `ConfigError` naming the line."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                where = f"{path}:{number}"
                yield where, parse_line(line, where=where)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([f"{path}: cannot be read ({error}); give a JSON lines file"]) from error


def parse_line(line: str | bytes, *, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError([f"{where}: is not JSON ({error}); one JSON object a line"]) from error
    if not isinstance(record, dict):
        raise ConfigError([f"{where}: holds a {type(record).__name__}; one JSON object a line"])
    return record
