"""Regime W as the original computed it, versions `v8` (eight arms) and `v11` (eleven), to the last digit.

Per question: `s_end` (answers agree), `s_path` (texts are alike), `s_cf` (called counterfactual, is not), `s_wm` (their
weighted sum); per trajectory a reward. `s_wm` is one number a question, so it never tells two trajectories of one
question apart, and preference pairs are made inside questions: `coherence.py` is the version that reaches training.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from types import MappingProxyType
from typing import NamedTuple

from syncline.offline.answers import ANSWER_RULES, AnswerRule

ALPHA_CORRECT = 1.0
BETA_COHERENCE = 0.5
GAMMA_QUALITY = 0.3
FULL_AGREEMENT_BONUS = 0.2
FULL_AGREEMENT = 0.9
LENGTH_PENALTY = 0.001
LENGTH_PENALTY_FROM = 512
"""Words, as the original counted its tokens: `len(text.split())`."""
PROBES = ("wolfram_standard", "wolfram_rephrase")


class Attempt(NamedTuple):
    """What scoring reads of a trajectory. `num_words` is the text's own unless a test says otherwise."""

    text: str
    arm: str
    num_words: int

    @classmethod
    def of(cls, text: str, arm: str) -> "Attempt":
        return cls(text, arm, len(text.split()))


@dataclass(frozen=True, slots=True)
class Metrics:
    s_end: float
    s_path: float
    s_cf: float
    s_wm: float


@dataclass(frozen=True, slots=True)
class Version:
    """What the revisions of the original differ in."""

    rule: AnswerRule
    weights: tuple[float, float, float]
    """Of s_end, s_path and s_cf in s_wm."""
    reads_texts: bool
    """s_path compares words, s_cf votes, and not lengths alone and the constant 0.5."""
    has_quality: bool


VERSIONS: Mapping[str, Version] = MappingProxyType(
    {
        "v8": Version(ANSWER_RULES["v8"], (0.4, 0.3, 0.3), reads_texts=False, has_quality=False),
        "v11": Version(ANSWER_RULES["v11"], (0.6, 0.4, 0.0), reads_texts=True, has_quality=True),
    }
)


def score_question(attempts: Sequence[Attempt], gold: str, version: Version) -> tuple[Metrics, list[float]]:
    """The question's metrics and each trajectory's reward. `gold` may hold a rationale, as GSM8K's answers do."""
    measured = metrics(attempts, version)
    return measured, rewards(attempts, gold, version, measured)


def is_correct(text: str, gold: str, version: Version) -> bool:
    expected = version.rule.answer(gold)
    return expected != "" and version.rule.answer(text) == expected


def metrics(attempts: Sequence[Attempt], version: Version) -> Metrics:
    answers = [version.rule.agree_by(version.rule.extract(attempt.text)) for attempt in attempts]
    words = [attempt.text.split() for attempt in attempts]
    s_end = end_agreement(answers)
    s_path = _even_lengths([len(own) for own in words])
    s_cf = 0.5
    if version.reads_texts:
        overlap = _mean_overlap([_vocabulary(attempt.text) for attempt in attempts])
        s_path = 0.4 * s_path + 0.6 * overlap if overlap is not None else s_path
        s_cf = _vote(answers)
    end, path, cf = version.weights
    return Metrics(s_end, s_path, s_cf, end * s_end + path * s_path + cf * s_cf)


def end_agreement(answers: Sequence[str]) -> float:
    """Share of pairs with the same answer; 1 for one answer, 0 for none. No answer agrees with no answer."""
    pairs = list(combinations(answers, 2))
    return sum(a == b for a, b in pairs) / len(pairs) if pairs else float(len(answers) == 1)


def rewards(attempts: Sequence[Attempt], gold: str, version: Version, measured: Metrics) -> list[float]:
    correct = [is_correct(attempt.text, gold, version) for attempt in attempts]
    quality = _qualities(attempts, correct) if version.has_quality else [0.0] * len(attempts)
    agreed = measured.s_end > FULL_AGREEMENT
    return [
        ALPHA_CORRECT * right
        + BETA_COHERENCE * measured.s_wm
        + GAMMA_QUALITY * own
        + FULL_AGREEMENT_BONUS * (right and agreed)
        - LENGTH_PENALTY * max(0, attempt.num_words - LENGTH_PENALTY_FROM)
        for attempt, right, own in zip(attempts, correct, quality, strict=True)
    ]


def _even_lengths(lengths: Sequence[int]) -> float:
    """1 / (1 + variance / mean) of the numbers of words; 0 without words."""
    mean = sum(lengths) / len(lengths) if lengths else 0.0
    if mean <= 0:
        return 0.0
    variance = sum((length - mean) ** 2 for length in lengths) / len(lengths)
    return 1.0 / (1.0 + variance / (mean + 1e-6))


def _mean_overlap(vocabularies: Sequence[set[str]]) -> float | None:
    """Mean Jaccard similarity over pairs with words; `None` without such a pair."""
    found = [jaccard(a, b) for a, b in combinations(vocabularies, 2) if a and b]
    return sum(found) / len(found) if found else None


def _vote(answers: Sequence[str]) -> float:
    counts = Counter(answer for answer in answers if answer)
    if not counts:
        return 0.5
    if len(counts) == 1:
        return 1.0
    return 0.0 if len(counts) == len(answers) else max(counts.values()) / len(answers)


def _qualities(attempts: Sequence[Attempt], correct: Sequence[bool]) -> list[float]:
    """0.4 × how short among the right ones + 0.6 × likeness to a right probe, itself included; 0 where wrong."""
    lengths = [attempt.num_words for attempt, right in zip(attempts, correct, strict=True) if right]
    shortest, longest = (min(lengths), max(lengths)) if len(lengths) > 1 else (0, 0)
    chosen = [a for a, right in zip(attempts, correct, strict=True) if right and a.arm in PROBES]
    probes = [_vocabulary(attempt.text) for attempt in chosen]

    def quality(attempt: Attempt) -> float:
        spread = longest - shortest
        concise = 1.0 - (attempt.num_words - shortest) / spread if spread else 0.5
        if not probes:
            return concise
        own = _vocabulary(attempt.text)
        if not own:
            return 0.5 * concise
        return min(1.0, max(0.0, 0.4 * concise + 0.6 * max(jaccard(own, probe) for probe in probes)))

    return [quality(attempt) if right else 0.0 for attempt, right in zip(attempts, correct, strict=True)]


def _vocabulary(text: str) -> set[str]:
    return set(text.lower().split())


def jaccard(a: set[str], b: set[str]) -> float:
    return len(a & b) / len(a | b) if a or b else 0.0
