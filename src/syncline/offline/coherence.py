"""Coherence `v2`: signals of one trajectory each, so that they reach the preferences made inside a question.

    agreement       share of the question's other trajectories with the same answer; 0 without an answer
    steps           share of the text's equations that hold
    paraphrase      share of the trajectories asked in other words (for those: of all asked otherwise) with its answer
    counterfactual  with one number of the question changed, does the answer become what it must? The mean of two
                    tests: the text's own equations run again (`arithmetic.replay`), and the answer of its twin, the
                    same arm and sample asked the changed question

A signal nobody can tell (no equations, no twin, a lone trajectory) is `None`, and `coherence`, the weighted mean of
the others, goes without it. reward = correct + 0.5 × coherence: a wrong answer never beats a right one.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from syncline.offline.answers import number
from syncline.offline.arithmetic import Counterfactual, Equation, equations, replay

WEIGHTS: Mapping[str, float] = MappingProxyType(
    {"agreement": 0.3, "steps": 0.3, "paraphrase": 0.15, "counterfactual": 0.25}
)
BETA = 0.5


class Solution(NamedTuple):
    """What scoring reads of a trajectory."""

    text: str
    answer: str
    """As `answers.ANSWER_RULES["v2"]` reads it."""
    correct: bool
    rephrased: bool
    twin_answer: str | None
    """What its twin answered; `None`: it has none."""


def score_coherence(solutions: Sequence[Solution], changed: Counterfactual | None) -> list[dict[str, float | None]]:
    """Each trajectory's signals, `coherence` and `reward`. `changed`: the question's counterfactual, if any."""
    return [_scores(own, [*solutions[:i], *solutions[i + 1 :]], changed) for i, own in enumerate(solutions)]


def _scores(own: Solution, others: Sequence[Solution], changed: Counterfactual | None) -> dict[str, float | None]:
    program = equations(own.text)
    signals = {
        "agreement": _agreement(own, others),
        "steps": _mean([float(step.holds) for step in program]),
        "paraphrase": _agreement(own, [other for other in others if other.rephrased != own.rephrased]),
        "counterfactual": _counterfactual(own, program, changed) if changed else None,
    }
    told = {name: value for name, value in signals.items() if value is not None}
    weight = sum(WEIGHTS[name] for name in told)
    coherence = sum(WEIGHTS[name] * value for name, value in told.items()) / weight if told else 0.0
    return signals | {"coherence": coherence, "reward": float(own.correct) + BETA * coherence}


def _agreement(own: Solution, others: Sequence[Solution]) -> float | None:
    return _mean([float(own.answer == other.answer and own.answer != "") for other in others])


def _counterfactual(own: Solution, program: Sequence[Equation], changed: Counterfactual) -> float | None:
    tests = []
    answer = number(own.answer)
    if program and answer is not None:
        rerun = replay(program, answer, old=changed.old, new=changed.new)
        tests.append(float(rerun == changed.answer))
    if own.twin_answer is not None:
        tests.append(float(number(own.twin_answer) == changed.answer))
    return _mean(tests)


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
