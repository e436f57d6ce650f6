"""`syncline env new`: a small environment that works, with a test that passes, to be changed into one's own."""

import keyword
import re
from pathlib import Path

from syncline.errors import ConfigError

ENVIRONMENT = '''"""{name}: add up the letters of a word, a=1 to z=26. Make it yours: task, prompt and score."""

import random
import re

from syncline.envs.scoring import Score
from syncline.envs.single_turn import SingleTurn
from syncline.types import Message

LETTERS = {{"train": "abcdefghijklm", "heldout": "nopqrstuvwxyz"}}
"""The splits share no task."""


class {title}(SingleTurn):
    name = "{name}"

    def __init__(self, *, length: int = 4, seed: int = 0) -> None:
        self.length, self.seed = length, seed

    def task(self, index: int, *, split: str = "train") -> str:
        """A pure function of the constructor's arguments, the index and the split."""
        rng = random.Random(f"{{self.seed}}/{{split}}/{{index}}")
        return "".join(rng.choices(LETTERS[split], k=self.length))

    def prompt(self, task: str) -> list[Message]:
        return [Message("user", f"With a=1, b=2, ..., z=26: what do the letters of {{task}} add up to?")]

    def answer(self, task: str, text: str) -> str | None:
        """What votes are counted by (maj@k): the last number."""
        numbers = re.findall(r"\\d+", text)
        return numbers[-1] if numbers else None

    def score(self, task: str, text: str) -> Score:
        """A wrong answer is a low score; what raises here is an error, and never trained on."""
        right = sum(ord(letter) - ord("a") + 1 for letter in task)
        correct = float(self.answer(task, text) == str(right))
        return Score(correct, {{"correct": correct}})
'''
TEST = '''"""What {name} owes: the same task again, splits apart, right beats wrong, and no text breaks it."""

import asyncio

import pytest
from {name} import {title}

from syncline.testing import ScriptedPolicy
from syncline.types import RolloutStatus


def attempt(text: str, task: str = "abc"):
    [rollout] = asyncio.run({title}().rollouts(task, 1, ScriptedPolicy(lambda seen: text)))
    return rollout


def test_task_is_a_pure_function_of_seed_index_and_split():
    assert {title}(seed=1).task(7) == {title}(seed=1).task(7) != {title}(seed=2).task(7)
    assert not set({title}().task(0)) & set({title}().task(0, split="heldout"))


def test_right_beats_wrong():
    assert [attempt(text).reward for text in ("1+2+3 is 6", "7", "")] == [1.0, 0.0, 0.0]


@pytest.mark.parametrize("text", ["", "\\x00", "six", "9" * 5000, "-", "{{" * 500])
def test_garbage_is_scored_never_raised(text: str):
    assert attempt(text).status is RolloutStatus.COMPLETED
'''


def write_environment(name: str, folder: Path) -> list[Path]:
    """`name.py` and `test_name.py`. Raises `ConfigError` for a name that is none, or a file that is there already."""
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name):
        raise ConfigError([f"name: {name!r} must be a Python module's name in lower case, such as word_sums"])
    texts = {folder / f"{name}.py": ENVIRONMENT, folder / f"test_{name}.py": TEST}
    if taken := [str(path) for path in texts if path.exists()]:
        raise ConfigError([f"name: {', '.join(taken)} is there already; choose another name or folder"])
    folder.mkdir(parents=True, exist_ok=True)
    for path, text in texts.items():
        path.write_text(text.format(name=name, title=class_name(name)), encoding="utf-8")
    return list(texts)


def class_name(name: str) -> str:
    """`word_sums` → `WordSums`."""
    return "".join(part.capitalize() for part in name.split("_"))
