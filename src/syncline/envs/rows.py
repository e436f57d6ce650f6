"""Tasks that are rows of a data set: JSON lines in a file, or a data set of the Hugging Face hub.

A fault in a row is a `ConfigError` naming file and line. Training rows come in a new order every epoch, held-out rows
once, in their own order; a row that is in both is refused.
"""

import json
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar

from syncline.envs.single_turn import check_split
from syncline.errors import ConfigError
from syncline.observe.files import text_lines
from syncline.observe.images import image_ref
from syncline.types import ImageRef, Message

T = TypeVar("T")
_NOT_COLUMNS = ("prompt", "completion", "completion_ids")
"""Names that reward functions get otherwise."""
Source = Iterable[tuple[str, Any]]
"""Pairs of where a row stands (`train.jsonl:3`) and the row."""


@dataclass(frozen=True, slots=True)
class PromptRow:
    """A row with a `prompt`, a text or messages, and whatever else it holds."""

    prompt: str | tuple[Message, ...]
    columns: Mapping[str, Any]
    messages: tuple[Message, ...]
    """The prompt as the model is shown it, with its images."""

    @property
    def key(self) -> str:
        """The same for rows that ask the same."""
        return "\n".join(part for m in self.messages for part in (m.content, *(image.sha256 for image in m.images)))


def prompt_row(row: Any, where: str) -> PromptRow:
    """The row's `images` are paths, relative to the file of the rows. They stand where a part `{"type": "image"}` of a
    message or `<image>` in a text calls for one, else in the user's first message; a part may bring its own:
    `{"type": "image", "image": "a.png"}`. Raises `ConfigError` naming the row."""
    prompt = row.get("prompt") if isinstance(row, Mapping) else None
    try:
        if not prompt:
            raise TypeError("no prompt")
        listed = row.get("images") or []
        paths = list(listed) if isinstance(listed, list | tuple) else [listed]
        chat = [("user", prompt)] if isinstance(prompt, str) else [(m["role"], m["content"]) for m in prompt]
        spoken = [(role, *_read(content, is_tagged=bool(paths))) for role, content in chat]
        if not any(images for _, images, _ in spoken):
            next((m for m in spoken if m[0] == "user"), spoken[0])[1].extend([None] * len(paths))
        left, folder = iter(paths), Path(where.rpartition(":")[0]).parent
        said = tuple(
            Message(role, text, tuple(_image(own or next(left, None), folder, where) for own in images))
            for role, images, text in spoken
        )
    except (TypeError, KeyError, ValueError) as error:
        what = "must be a text or a list of {role, content}, each content a text, or images and then a text"
        raise ConfigError([f"{where}: field 'prompt' {what}: {error}"]) from error
    if (unused := next(left, None)) is not None:
        raise ConfigError([f"{where}: field 'images': nothing in the prompt calls for {unused!r}; leave it out"])
    columns = {name: value for name, value in row.items() if name not in _NOT_COLUMNS}
    return PromptRow(prompt if isinstance(prompt, str) else said, columns, said)


def _read(content: Any, *, is_tagged: bool) -> tuple[list[Any], str]:
    """The images that a message calls for (`None`: the row's next), and its text."""
    if isinstance(content, str):
        first, *others = content.split("<image>") if is_tagged else [content]
        content = [{"type": "text", "text": first}]
        content += [part for text in others for part in ({"type": "image"}, {"type": "text", "text": text})]
    images, text = [], ""
    for part in content:
        if part["type"] == "text":
            text += part["text"]
        elif part["type"] != "image":
            raise TypeError(f"a part of type {part['type']!r} is not shown")
        elif text.strip():
            raise TypeError("an image stands after a text; put it before")
        else:
            images.append(part.get("image") or part.get("path"))
    return images, text


def _image(path: Any, folder: Path, where: str) -> ImageRef:
    if not isinstance(path, str):
        raise ConfigError([f"{where}: field 'images' has {path!r} where the prompt calls for a path; add one"])
    return image_ref(folder / path)


class Rows(Generic[T]):
    """`build(row, where)` makes a task of a row; `key(task)` tells whether two tasks are the same."""

    def __init__(
        self,
        train: Source,
        heldout: Callable[[], Source],
        *,
        build: Callable[[Any, str], T],
        key: Callable[[T], str],
        seed: int,
    ) -> None:
        self.train = [build(row, where) for where, row in train]
        if not self.train:
            raise ConfigError(["path: has no training rows; give a data set that has some"])
        self._load_heldout = heldout
        self._build, self._key, self._seed = build, key, seed

    @cached_property
    def heldout(self) -> list[T]:
        """Read when first asked for."""
        rows = [self._build(row, where) for where, row in self._load_heldout()]
        trained_on = {self._key(row) for row in self.train}
        shared = [self._key(row) for row in rows if self._key(row) in trained_on]
        if shared:
            raise ConfigError([f"heldout_path: {len(shared)} questions are training rows too, such as {shared[0]!r}"])
        return rows

    def task(self, index: int, *, split: str) -> T:
        check_split(split)
        if split == "train":
            epoch, position = divmod(index, len(self.train))
            return self.train[_shuffled(position, len(self.train), random.Random(f"{self._seed}/{epoch}"))]
        if index >= len(self.heldout):
            raise ConfigError([f"evaluation.num_tasks: there are {len(self.heldout)} held-out rows; ask for no more"])
        return self.heldout[index]


def open_rows(
    path: str | None, heldout_path: str | None, *, hub: tuple[str, str | None] | None, heldout_split: str = "test"
) -> tuple[Source, Callable[[], Source]]:
    """Training rows, and a way to the held-out ones: both from files, or both from the hub's data set `(name, config)`.

    Raises `ConfigError` naming what is missing.
    """
    if path is not None:
        return file_rows(path), lambda: _heldout_rows(heldout_path)
    if heldout_path is not None:
        raise ConfigError([f"heldout_path: {heldout_path!r} is given without path; give both, or neither for the hub"])
    if hub is None:
        raise ConfigError(["path: missing; give a JSONL file, or dataset, a name on the hub"])
    return _hub_rows(hub, "train"), lambda: _hub_rows(hub, heldout_split)


def _heldout_rows(path: str | None) -> Source:
    if path is None:
        raise ConfigError(["heldout_path: is needed for held-out tasks; give the JSONL file of the test rows"])
    return file_rows(path)


def file_rows(path: str) -> Iterator[tuple[str, Any]]:
    """Of a JSON lines file."""
    try:
        lines = text_lines(Path(path))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([f"path: {path!r} cannot be read ({error}); give a JSONL file"]) from error
    if lines == [""]:
        raise ConfigError([f"path: {path} has no rows"])
    for n, line in enumerate(lines, start=1):
        yield f"{path}:{n}", _json(line, where=f"{path}:{n}")


def _hub_rows(hub: tuple[str, str | None], split: str) -> Iterator[tuple[str, Any]]:
    name, config = hub
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ConfigError(
            ["path: is not given, and the hub needs `pip install 'syncline[gsm8k]'`; or give a JSONL file"]
        ) from error
    try:
        rows = load_dataset(name, config, split=split)
    except (OSError, ValueError) as error:
        remedy = "give the rows as JSONL files with path and heldout_path"
        raise ConfigError(
            [f"path: is not given, and {name} cannot be loaded from the hub ({error}); {remedy}"]
        ) from error
    for n, row in enumerate(rows, start=1):
        yield f"{name} {split}:{n}", row


def _json(line: str, *, where: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError([f"{where}: is not JSON ({error}); a row is one JSON object a line"]) from error


def _shuffled(position: int, size: int, rng: random.Random) -> int:
    """A permutation of `range(size)` that needs no list: steps of a stride that shares no factor with the size."""
    offset, stride = rng.randrange(size), rng.randrange(1, size + 1)
    while math.gcd(stride, size) != 1:
        stride = rng.randrange(1, size + 1)
    return (offset + stride * position) % size
