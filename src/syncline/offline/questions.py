"""The questions of a collection or an evaluation: rows of a file or the hub, or sums made on the spot.

A row that lacks its question or answer, or names them otherwise, is a `ConfigError` naming the row; a question that is
there twice is left out the second time, and counted.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from syncline.config.offline_collect import Questions
from syncline.envs.rows import open_rows
from syncline.envs.tasks.arithmetic import Arithmetic
from syncline.errors import ConfigError
from syncline.offline.answers import number

NUM_MADE = 256


@dataclass(frozen=True, slots=True)
class Question:
    question: str
    solution: str
    """As its row has it: GSM8K's rationale and `#### 18`, or the bare answer."""

    @property
    def question_id(self) -> str:
        return hashlib.sha256(self.question.encode()).hexdigest()[:12]

    @property
    def gold(self) -> str:
        """What stands behind the last `####`; the whole where there is none."""
        return self.solution.rpartition("####")[2].strip()


@dataclass(frozen=True, slots=True)
class Loaded:
    questions: tuple[Question, ...]
    num_duplicates: int
    """Left out."""


def load_questions(asked: Questions, *, seed: int, heldout: bool) -> Loaded:
    """Raises `ConfigError` naming the row, or that there is none. `seed` and `heldout` are for made ones alone."""
    if asked.made is not None:
        rows = islice(_made(asked.made, seed=seed, heldout=heldout), asked.num_questions or NUM_MADE)
    elif asked.hub is not None:
        name, _, config = asked.hub.partition(":")
        _, own_split = open_rows(None, None, hub=(name, config or None), heldout_split=asked.split)
        rows = islice((_question(row, where) for where, row in own_split()), asked.num_questions)
    else:
        source, _ = open_rows(asked.path, None, hub=None)
        rows = islice((_question(row, where) for where, row in source), asked.num_questions)
    read = list(rows)
    if not read:
        raise ConfigError([f"{asked.name}: there is not one question"])
    unique: dict[str, Question] = {}
    for question in read:
        unique.setdefault(question.question, question)
    return Loaded(tuple(unique.values()), len(read) - len(unique))


def _made(arguments: Mapping[str, Any], *, seed: int, heldout: bool) -> Iterator[Question]:
    try:
        environment = Arithmetic(**{"seed": seed, **arguments})
    except TypeError as error:
        raise ConfigError([f"made: {error}; these are the arguments of the task arithmetic"]) from error
    index = 0
    while True:
        task = environment.task(index, split="heldout" if heldout else "train")
        yield Question(environment.prompt(task)[0].content, str(task.answer))
        index += 1


def _question(row: Any, where: str) -> Question:
    if not isinstance(row, Mapping):
        raise ConfigError([f"{where}: is no object; a row has a question and an answer"])
    for key in ("question", "answer"):
        if key not in row:
            raise ConfigError([f"{where}: field {key!r} is missing; the row has {', '.join(map(repr, row))}"])
        if not isinstance(text := row[key], str) or not text.strip() or re.search("[\ud800-\udfff]", text):
            fault = "it must be a text that is not empty, and no half of a character alone (a surrogate)"
            raise ConfigError([f"{where}: field {key!r} is {text!r}; {fault}"])
    found = Question(row["question"].strip(), row["answer"].strip())
    if number(found.gold) is None:
        raise ConfigError(
            [f"{where}: answer ends in {found.gold[-40:]!r}; it must end in a number, or `#### <number>`"]
        )
    return found
