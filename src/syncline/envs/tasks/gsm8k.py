"""Grade-school word problems (Cobbe et al. 2021, arXiv:2110.14168): rows from JSONL files or from the Hugging Face hub.

An answer counts where the prompt asked for it, in `\\boxed{}` or after `####`. `checker: math-verify` compares it so
that `18.0`, `\\$18` and `\\frac{36}{2}` are all 18; `exact` knows decimal numbers alone and needs nothing installed.
math-verify's own time limits need signals, which only a main thread may set: they are off, and what could take long is
refused by its text instead (`_too_costly`).
"""

import json
import math
import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

from syncline.envs.scoring import Score, check_weights, weighted_score
from syncline.envs.single_turn import SingleTurn, check_split
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
        if heldout_path is not None and path is None:
            raise ConfigError(
                [f"heldout_path: {heldout_path!r} is given without path; give both, or neither for the hub"]
            )
        self.answer_format = ANSWER_FORMATS[answer_format]
        self.weights = check_weights(weights or {"correct": 1.0}, parts=("correct", "format", "length"))
        self.max_chars = max_chars
        self.seed = seed
        self._heldout_path = heldout_path
        self._path = path
        self._math_verify = _math_verify() if checker == "math-verify" else None
        self.toolbox = build_toolbox(tools, max_turns=max_turns, sandbox=sandbox)
        self.train = list(_file_rows(path) if path is not None else _hub_rows("train"))

    @cached_property
    def heldout(self) -> list[WordProblem]:
        """The test rows, read when first asked for."""
        if self._path is not None and self._heldout_path is None:
            raise ConfigError(["heldout_path: is needed for held-out tasks; give the JSONL file of the test rows"])
        rows = list(_file_rows(self._heldout_path) if self._heldout_path is not None else _hub_rows("test"))
        trained_on = {row.question for row in self.train}
        shared = [row.question for row in rows if row.question in trained_on]
        if shared:
            raise ConfigError([f"heldout_path: {len(shared)} questions are training rows too, such as {shared[0]!r}"])
        return rows

    def task(self, index: int, *, split: str = "train") -> WordProblem:
        """Training rows come in a new order every epoch, held-out rows once, in the file's order."""
        check_split(split)
        if split == "train":
            epoch, position = divmod(index, len(self.train))
            return self.train[_shuffled(position, len(self.train), random.Random(f"{self.seed}/{epoch}"))]
        if index >= len(self.heldout):
            raise ConfigError([f"evaluation.num_tasks: gsm8k has {len(self.heldout)} held-out rows; ask for no more"])
        return self.heldout[index]

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


def _shuffled(position: int, size: int, rng: random.Random) -> int:
    """A permutation of `range(size)` that needs no list: steps of a stride that shares no factor with the size."""
    offset, stride = rng.randrange(size), rng.randrange(1, size + 1)
    while math.gcd(stride, size) != 1:
        stride = rng.randrange(1, size + 1)
    return (offset + stride * position) % size


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


def _file_rows(path: str) -> Iterator[WordProblem]:
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([f"path: {path!r} cannot be read ({error}); give a JSONL file"]) from error
    return _rows(path, (_json(line, where=f"{path}:{n}") for n, line in enumerate(lines, start=1)))


def _hub_rows(split: str) -> Iterator[WordProblem]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ConfigError(
            ["path: is not given, and the hub needs `pip install 'syncline[gsm8k]'`; or give a JSONL file"]
        ) from error
    try:
        rows = load_dataset(HUB_NAME, "main", split=split)
    except (OSError, ValueError) as error:
        remedy = "give the rows as JSONL files with path and heldout_path"
        raise ConfigError(
            [f"path: is not given, and {HUB_NAME} cannot be loaded from the hub ({error}); {remedy}"]
        ) from error
    return _rows(f"{HUB_NAME} {split}", rows)


def _rows(source: str, rows: Iterable[Any]) -> Iterator[WordProblem]:
    number = 0
    for number, row in enumerate(rows, start=1):
        yield _problem(row, where=f"{source}:{number}")
    if not number:
        raise ConfigError([f"path: {source} has no rows"])


def _json(line: str, *, where: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ConfigError([f"{where}: is not JSON ({error}); a row is one JSON object a line"]) from error


def _problem(row: Any, *, where: str) -> WordProblem:
    for key in ("question", "answer"):
        value = row.get(key) if isinstance(row, Mapping) else None
        if not isinstance(value, str) or not value.strip():
            raise ConfigError([f"{where}: field {key!r} is missing or empty; a row has a question and an answer"])
    answer = row["answer"].rpartition("####")[2].replace(",", "").strip()
    if "####" not in row["answer"] or not _INTEGER.fullmatch(answer):
        raise ConfigError([f"{where}: answer {row['answer'][-40:]!r} does not end in `#### <integer>`"])
    return WordProblem(row["question"].strip(), answer)
