"""Grade-school word problems (Cobbe et al. 2021, arXiv:2110.14168): rows from JSONL files or from the Hugging Face hub.

An answer counts where the prompt asked for it, in `\\boxed{}` or after `####`. `checker: math-verify` compares it so
that `18.0`, `\\$18` and `\\frac{36}{2}` are all 18; `exact` knows decimal numbers alone and needs nothing installed.
math-verify's own time limits need signals, which only a main thread may set: they are off, and what could take long is
refused by its text instead (`_too_costly`).
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from types import ModuleType
from typing import Any

from syncline.envs.rows import Rows, open_rows
from syncline.envs.scoring import Score, check_weights, weighted_score
from syncline.envs.single_turn import SingleTurn
from syncline.envs.toolbox import build_toolbox
from syncline.errors import ConfigError
from syncline.types import Message

HUB_NAME = "openai/gsm8k"
MAX_ANSWER_CHARS = 64
CHECKERS = ("math-verify", "exact")
_INTEGER = re.compile(r"-?\d+")
_DECIMAL = re.compile(r"[-+]?\d+(\.\d*)?")
_COSTLY = re.compile(r"\^|!|\*\*|\\(?!d?frac|times|text|left|right|\$|%|,)")
"""Powers, factorials and every command but the few that a number is written with."""


@dataclass(frozen=True, slots=True)
class AnswerFormat:
    """What the prompt asks for and how the last such answer is found."""

    instruction: str
    pattern: re.Pattern[str]


ANSWER_FORMATS = {
    "boxed": AnswerFormat("put the final answer in \\boxed{}", re.compile(r"\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}")),
    "hashes": AnswerFormat("end with a line `#### answer`", re.compile(r"####[ \t]*([^\n]*)")),
}


@dataclass(frozen=True, slots=True)
class WordProblem:
    question: str
    answer: str
    """The integer after `####`: `18`, `-3`."""


class Gsm8k(SingleTurn):
    """Parts of the reward: `correct`; `format` (an answer stands where it was asked for); `length` (1 up to `max_chars`
    characters, falling to 0 at twice that; soft over-length penalty of DAPO, arXiv:2503.14476, eq. 13).

    `path` and `heldout_path` are JSONL files of `{"question": ..., "answer": "... #### 18"}`; without `path`, both
    splits come from the hub through `datasets`. A fault in a row is a `ConfigError` naming file and line. `tools` are
    names that `toolbox.build_toolbox` knows, with at most `max_turns` answers and `sandbox`, the limits of `python`.
    """

    name = "gsm8k"

    def __init__(
        self,
        *,
        path: str | None = None,
        heldout_path: str | None = None,
        answer_format: str = "boxed",
        weights: Mapping[str, float] | None = None,
        max_chars: int = 2000,
        checker: str = "math-verify",
        tools: Sequence[str] = (),
        max_turns: int = 4,
        sandbox: Mapping[str, Any] | None = None,
        seed: int = 0,
    ) -> None:
        if checker not in CHECKERS:
            raise ConfigError([f"checker: {checker!r} is not one of {', '.join(CHECKERS)}"])
        if answer_format not in ANSWER_FORMATS:
            raise ConfigError([f"answer_format: {answer_format!r} is not one of {', '.join(ANSWER_FORMATS)}"])
        if max_chars < 1:
            raise ConfigError([f"max_chars: {max_chars} must be >= 1"])
        self.answer_format = ANSWER_FORMATS[answer_format]
        self.weights = check_weights(weights or {"correct": 1.0}, parts=("correct", "format", "length"))
        self.max_chars = max_chars
        self._math_verify = _math_verify() if checker == "math-verify" else None
        self.toolbox = build_toolbox(tools, max_turns=max_turns, sandbox=sandbox)
        train, heldout = open_rows(path, heldout_path, hub=(HUB_NAME, "main"))
        self.rows = Rows(train, heldout, build=_problem, key=lambda row: row.question, seed=seed)
        self.num_train_tasks = len(self.rows.train)

    def task(self, index: int, *, split: str = "train") -> WordProblem:
        return self.rows.task(index, split=split)

    def prompt(self, task: WordProblem) -> list[Message]:
        instruction = f"Think step by step, then {self.answer_format.instruction}."
        return [Message("user", f"{task.question}\n\n{instruction}\n\n")]

    def answer(self, task: WordProblem, text: str) -> str | None:
        """The answer as votes are counted by: numbers that are equal are the same; `None` without one."""
        answer = self._marked(text)
        number = _number(answer)
        return str(number) if number is not None else answer or None

    def score(self, task: WordProblem, text: str) -> Score:
        answer = self._marked(text)
        parts = {
            "correct": float(self._equivalent(answer, task.answer)),
            "format": float(bool(answer)),
            "length": 1.0 - min(max(len(text) / self.max_chars - 1.0, 0.0), 1.0),
        }
        return weighted_score(parts, self.weights)

    def _marked(self, text: str) -> str:
        """What stands last where an answer was asked for."""
        marked = self.answer_format.pattern.findall(text)
        return marked[-1].strip().removesuffix(".") if marked else ""

    def _equivalent(self, answer: str, gold: str) -> bool:
        number = _number(answer)
        if number is not None:
            return number == int(gold)
        if not answer or self._math_verify is None or _too_costly(answer):
            return False
        parsed = self._math_verify.parse(f"\\boxed{{{answer}}}", parsing_timeout=None)
        expected = self._math_verify.parse(f"\\boxed{{{gold}}}", parsing_timeout=None)
        return self._math_verify.verify(expected, parsed, timeout_seconds=None)


def _number(answer: str) -> Fraction | None:
    """A decimal number, exactly: `1,080`, `\\$18.50`; `None` for anything else."""
    plain = answer.replace(",", "").removeprefix("\\").removeprefix("$").strip()
    if len(answer) > MAX_ANSWER_CHARS or not _DECIMAL.fullmatch(plain):
        return None
    return Fraction(plain)


def _math_verify() -> ModuleType:
    try:
        import math_verify
    except ImportError as error:
        raise ConfigError(
            ["checker: gsm8k compares answers by math-verify; `pip install 'syncline[gsm8k]'`, or set exact"]
        ) from error
    return math_verify


def _too_costly(answer: str) -> bool:
    """A number is short and needs no power: `9^{9^9}` would be worked out digit by digit."""
    return len(answer) > MAX_ANSWER_CHARS or _COSTLY.search(answer) is not None


def _problem(row: Any, where: str) -> WordProblem:
    for key in ("question", "answer"):
        value = row.get(key) if isinstance(row, Mapping) else None
        if not isinstance(value, str) or not value.strip():
            raise ConfigError([f"{where}: field {key!r} is missing or empty; a row has a question and an answer"])
    answer = row["answer"].rpartition("####")[2].replace(",", "").strip()
    if "####" not in row["answer"] or not _INTEGER.fullmatch(answer):
        raise ConfigError([f"{where}: answer {row['answer'][-40:]!r} does not end in `#### <integer>`"])
    return WordProblem(row["question"].strip(), answer)
