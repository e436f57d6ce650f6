"""What the stages hand each other: one trajectory a JSON line, `docs/offline.md`'s `rollouts.jsonl`.

A line that lacks a field, misspells one or holds what does not fit together is a `ConfigError` naming file and line.
"""

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from syncline.errors import ConfigError
from syncline.offline.lines import read_records

TWIN = "@cf"
"""Ends the name of a counterfactual twin's arm."""


class Said(BaseModel):
    """One message, as `datasets` and TRL write it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    role: str
    content: str


class Attempt(BaseModel):
    """A trajectory as it was sampled, in `attempts.jsonl`."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    key: str
    question_id: str
    question: str
    gold: str
    arm: str
    sample: int
    seed: int
    prompt: tuple[Said, ...]
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    num_tokens: int
    num_prompt_tokens: int
    finish_reason: Literal["stop", "length"]
    model: str

    @model_validator(mode="after")
    def _fits(self) -> "Attempt":
        if not len(self.token_ids) == len(self.logprobs) == self.num_tokens:
            counts = f"{len(self.token_ids)} token_ids, {len(self.logprobs)} logprobs, num_tokens {self.num_tokens}"
            raise ValueError(f"{counts}: these must be as many")
        return self

    @property
    def is_twin(self) -> bool:
        """Asked with a number changed: a probe of its original, not an attempt at the question."""
        return self.arm.endswith(TWIN)


class Trajectory(Attempt):
    """A scored one, in `rollouts.jsonl`."""

    answer: str
    correct: bool
    scores: Mapping[str, float | None]

    @property
    def reward(self) -> float:
        reward = self.scores.get("reward")
        if reward is None:
            raise ConfigError([f"{self.key}: scores has no reward; collect writes one"])
        return reward


T = TypeVar("T", bound=Attempt)


def read_trajectories(path: Path, kind: type[T]) -> Iterable[T]:
    """Raises `ConfigError` naming the line, and one for a file without lines."""
    empty = True
    for where, record in read_records(path):
        empty = False
        yield parse_record(record, kind, where=where)
    if empty:
        raise ConfigError([f"{path}: has no trajectories; collect some first"])


def parse_record(record: Mapping[str, Any], kind: type[T], *, where: str) -> T:
    try:
        return kind.model_validate(record)
    except ValidationError as error:
        raise ConfigError([f"{where}: {_told(fault, kind, record)}" for fault in error.errors()]) from error


def _told(fault: Any, kind: type[Attempt], record: Mapping[str, Any]) -> str:
    name = ".".join(map(str, fault["loc"]))
    if fault["type"] == "missing":
        unknown = [field for field in record if field not in kind.model_fields]
        close = difflib.get_close_matches(name, unknown, n=1)
        return f"field {name!r} is missing" + (f"; is it the one written {close[0]!r}?" if close else "")
    if fault["type"] == "extra_forbidden":
        return f"unknown field {name!r}; known are {', '.join(kind.model_fields)}"
    return f"field {name!r}: {fault['msg']}" if name else fault["msg"].removeprefix("Value error, ")
