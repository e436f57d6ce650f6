"""Endless integer arithmetic: generated, verifiable, of graded difficulty. `12+7=` is answered by `19`.

Which split an operand tuple belongs to is a hash of its sorted operands, whatever the seed, order and operators:
a held-out sum is unseen in every run, and by a base model that was trained on another seed.
"""

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from syncline.envs.scoring import Score, check_weights, weighted_score
from syncline.envs.single_turn import SingleTurn, check_split, hashed_split
from syncline.errors import ConfigError
from syncline.types import Message

_MAX_DRAWS = 10_000
_INTEGER = re.compile(r"-?\d+")


@dataclass(frozen=True, slots=True)
class Level:
    """A difficulty: `terms` operands of at most `digits` digits each, drawn with a share of `weight`."""

    digits: int
    terms: int = 2
    weight: float = 1.0

    @property
    def label(self) -> str:
        return f"{self.digits} digits x {self.terms} terms"


@dataclass(frozen=True, slots=True)
class ArithmeticTask:
    """One exercise: operands (12, 7) and operators ("+",) are asked as `12+7=`."""

    operands: tuple[int, ...]
    operators: tuple[str, ...]
    level: str

    @property
    def expression(self) -> str:
        rest = (f"{op}{operand}" for op, operand in zip(self.operators, self.operands[1:], strict=True))
        return f"{self.operands[0]}{''.join(rest)}"

    @property
    def answer(self) -> int:
        """The value, products first."""
        total, product = 0, self.operands[0]
        for op, operand in zip(self.operators, self.operands[1:], strict=True):
            if op == "*":
                product *= operand
            else:
                total, product = total + product, operand if op == "+" else -operand
        return total + product


class Arithmetic(SingleTurn):
    """Parts of the reward: `correct` (the answer is that integer and nothing else), `format` (it is an integer),
    `digits` (share of the answer's digits that are right, from the left). Only `correct` has weight unless asked.
    """

    name = "arithmetic"

    def __init__(
        self,
        *,
        seed: int = 0,
        operations: Sequence[str] = ("+",),
        levels: Sequence[Mapping[str, Any]] = ({"digits": 2, "terms": 2},),
        weights: Mapping[str, float] | None = None,
    ) -> None:
        self.seed = seed
        self.operations = _checked_operations(operations)
        self.levels = _checked_levels(levels)
        self.weights = check_weights(weights or {"correct": 1.0}, parts=("correct", "format", "digits"))

    def task(self, index: int, *, split: str = "train") -> ArithmeticTask:
        check_split(split)
        rng = random.Random(f"{self.seed}/{split}/{index}")
        level = rng.choices(self.levels, weights=[lv.weight for lv in self.levels])[0]
        for _ in range(_MAX_DRAWS):
            operands = tuple(rng.randrange(10**level.digits) for _ in range(level.terms))
            operators = tuple(rng.choice(self.operations) for _ in operands[1:])
            if split_of(operands) == split:
                return ArithmeticTask(operands, operators, level.label)
        raise AssertionError(f"no {split} operands of level {level} in {_MAX_DRAWS} draws")

    def prompt(self, task: ArithmeticTask) -> list[Message]:
        return [Message("user", f"{task.expression}=")]

    def answer(self, task: ArithmeticTask, text: str) -> str | None:
        del task
        return text.strip() or None

    def score(self, task: ArithmeticTask, text: str) -> Score:
        answer, right = text.strip(), str(task.answer)
        parts = {
            "correct": float(answer == right),
            "format": float(_INTEGER.fullmatch(answer) is not None),
            "digits": sum(a == b for a, b in zip(answer, right, strict=False)) / max(len(answer), len(right)),
        }
        return weighted_score(parts, self.weights)


def split_of(operands: Sequence[int]) -> str:
    """Whatever the order of the operands, the operators and the seed."""
    return hashed_split(str(sorted(operands)))


def _checked_operations(operations: Sequence[str]) -> tuple[str, ...]:
    if not operations or not set(operations) <= {"+", "-", "*"}:
        raise ConfigError([f"operations: {list(operations)!r} must be one or more of '+', '-', '*'"])
    return tuple(operations)


def _checked_levels(levels: Sequence[Mapping[str, Any]]) -> tuple[Level, ...]:
    if not levels:
        raise ConfigError(["levels: is empty; give at least one, such as {digits: 2, terms: 2}"])
    try:
        built = tuple(Level(**level) for level in levels)
    except TypeError as error:
        raise ConfigError(
            [f"levels: {list(levels)!r}: {error}; a level is {{digits: 2, terms: 2, weight: 1.0}}"]
        ) from error
    for i, level in enumerate(built):
        is_whole = isinstance(level.digits, int) and isinstance(level.terms, int)
        if not is_whole or level.digits < 1 or level.terms < 2 or not level.weight > 0:
            raise ConfigError([f"levels.{i}: {level} needs digits >= 1, terms >= 2 and weight > 0"])
    return built
