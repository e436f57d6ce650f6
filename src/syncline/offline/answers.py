"""The final answer of a text, three ways: as the two versions of the original read it, to the letter, and as we do.

`v8` and `v11` keep what they got wrong (`1,875` is 1 in `v8`; `well, it is 5` is a comma in `v11`): their scores can
only be compared if the answers are theirs. `v2` compares numbers.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from types import MappingProxyType

MAX_DIGITS = 40
_MARK = re.compile(r"####|(?i:answer)\W{0,4}:|\\boxed\{")
_NUMBER = re.compile(r"(?:[-−]\s*)?(?:\$\s*)?[-−]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:\s*/\s*\d+)?")
"""No part of it begins with spaces: a search through a long run of them would take the cube of its length."""


@dataclass(frozen=True, slots=True)
class AnswerRule:
    """How a version finds an answer, `extract`, and what it compares, `normalise`."""

    extract: Callable[[str], str]
    normalise: Callable[[str], str]
    agree_by: Callable[[str], str]
    """What `s_end` compares extracted answers by: in `v8` not the same as `correct` does."""

    def answer(self, text: str) -> str:
        return self.normalise(self.extract(text))


def extract_v8(text: str) -> str:
    return _after_marks(text, ("####",), re.compile(r"-?\d+\.?\d*"))


def extract_v11(text: str) -> str:
    return _after_marks(text, ("Answer:", "####"), re.compile(r"-?[\d,]+\.?\d*"))


def _after_marks(text: str, marks: tuple[str, ...], number: re.Pattern[str]) -> str:
    """The first number behind the last of the first mark that has one; else the last anywhere; else the text."""
    for mark in marks:
        if mark in text and (found := number.search(text.rpartition(mark)[2])):
            return found.group()
    everywhere = number.findall(text)
    return everywhere[-1] if everywhere else text.strip()


def normalise_original(answer: str) -> str:
    plain = answer.strip().lower().replace(",", "")
    try:
        value = float(plain) if "." in plain else None
    except ValueError:
        return plain
    return str(int(value)) if value is not None and value.is_integer() else plain


def _lower(answer: str) -> str:
    return answer.strip().lower()


def extract_v2(text: str) -> str:
    """The last number that stands where an answer was asked for (`Answer:`, `####`, a box); else the last number."""
    for mark in reversed([*_MARK.finditer(text)]):
        if found := _NUMBER.search(text[mark.end() :].partition("\n")[0]):
            return found.group()
    numbers = _NUMBER.findall(text)
    return numbers[-1] if numbers else ""


def normalise_number(answer: str) -> str:
    """`$1,234.50` → `2469/2`, `18.0` → `18`; `""` for what is no number of at most `MAX_DIGITS` characters."""
    value = number(answer)
    return "" if value is None else str(value)


def number(answer: str) -> Fraction | None:
    joined = re.sub(r"(?<=\d)\s+(?=\d)", "?", answer)  # `70 000` is no number: what reads texts stops at the space
    plain = re.sub(r"[\s,$]", "", joined).replace("−", "-").removesuffix(".")
    if len(plain) > MAX_DIGITS or not re.fullmatch(r"-?(\d+(\.\d+)?|\.\d+)(/\d+)?", plain):
        return None
    top, _, bottom = plain.partition("/")
    return Fraction(top) / Fraction(bottom) if bottom.strip("0") else (None if bottom else Fraction(top))


ANSWER_RULES: Mapping[str, AnswerRule] = MappingProxyType(
    {
        "v8": AnswerRule(extract_v8, normalise_original, agree_by=_lower),
        "v11": AnswerRule(extract_v11, normalise_original, agree_by=normalise_original),
        "v2": AnswerRule(extract_v2, normalise_number, agree_by=normalise_number),
    }
)
