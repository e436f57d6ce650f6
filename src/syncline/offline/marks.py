"""What a set of answers says of a model, and two such sets of two models: rates with intervals, and a paired test.

Pure: answers in, numbers out. Everything at k comes from the one set of sampled answers, the greedy one is apart.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from syncline.config.offline import Eval
from syncline.envs.estimators import majority_at, mcnemar, pass_at, sizes, wilson
from syncline.offline.answers import ANSWER_RULES
from syncline.offline.harness import exact_match, flexible_extract, strict_match
from syncline.offline.questions import Question
from syncline.offline.records import Attempt

GREEDY, SAMPLED = "greedy", "sampled"


@dataclass(frozen=True, slots=True)
class Marked:
    """One answer, read. `solution` is its question's."""

    question_id: str
    question: str
    solution: str
    gold: str
    arm: str
    text: str
    num_tokens: int
    is_truncated: bool
    answer: str
    is_correct: bool
    is_formatted: bool
    """An answer stands where the prompt asked for it."""


def read_answer(asked: Eval, question: Question, attempt: Attempt) -> Marked:
    rule = ANSWER_RULES[asked.answers]
    gold, answer = rule.answer(question.solution), rule.answer(attempt.text)
    return Marked(
        question_id=question.question_id,
        question=question.question,
        solution=question.solution,
        gold=gold,
        arm=attempt.arm,
        text=attempt.text,
        num_tokens=attempt.num_tokens,
        is_truncated=attempt.finish_reason == "length",
        answer=answer,
        is_correct=gold != "" and answer == gold,
        is_formatted=re.search(asked.format, attempt.text) is not None,
    )


def summarise(answers: Sequence[Marked]) -> dict[str, Any]:
    """JSON-able. `greedy` is over the questions, `sampled` over all samples; `pass_at` and `majority_at` are by k."""
    greedy = [one for one in answers if one.arm == GREEDY]
    by_question: dict[str, list[Marked]] = {}
    for one in answers:
        if one.arm == SAMPLED:
            by_question.setdefault(one.question_id, []).append(one)
    samples = list(by_question.values())
    sampled = [one for own in samples for one in own]
    return {
        "num_questions": len(greedy),
        "greedy": _rates(greedy) | {"interval": _interval(greedy)},
        "sampled": _rates(sampled) | {"num_samples": len(samples[0])} if samples else None,
        "pass_at": _at_each_k(samples, _pass_at),
        "majority_at": _at_each_k(samples, _majority_at),
        "lm_eval": _as_the_harness(greedy),
    }


def compare(before: Sequence[Marked], after: Sequence[Marked]) -> dict[str, Any]:
    """Greedy answers to the questions that both have. `p` is McNemar's, exact and two-sided."""
    old = {one.question_id: one for one in before if one.arm == GREEDY}
    pairs = [(old[one.question_id], one) for one in after if one.arm == GREEDY and one.question_id in old]
    fixed = sum(new.is_correct and not was.is_correct for was, new in pairs)
    broken = sum(was.is_correct and not new.is_correct for was, new in pairs)
    return {
        "num_questions": len(pairs),
        "num_left_out": len(old) + sum(one.arm == GREEDY for one in after) - 2 * len(pairs),
        "accuracy_before": _share([was.is_correct for was, _ in pairs]),
        "accuracy_after": _share([new.is_correct for _, new in pairs]),
        "fixed": fixed,
        "broken": broken,
        "same_text": sum(was.text == new.text for was, new in pairs),
        "p": mcnemar(fixed, broken),
        "sampled": _compare_samples(before, after),
    }


def _compare_samples(before: Sequence[Marked], after: Sequence[Marked]) -> dict[str, Any] | None:
    """Right samples of the questions that both have. `p` is the sign test's over questions: more of its samples right
    after than before, or fewer."""
    old, new = _rates_by_question(before), _rates_by_question(after)
    both = [(old[question_id], new[question_id]) for question_id in old.keys() & new.keys()]
    if not both:
        return None
    better, worse = sum(b > a for a, b in both), sum(b < a for a, b in both)
    means = {"before": _share([a for a, _ in both]), "after": _share([b for _, b in both])}
    return means | {"better": better, "worse": worse, "p": mcnemar(better, worse)}


def _rates_by_question(answers: Sequence[Marked]) -> dict[str, float]:
    hits: dict[str, list[bool]] = {}
    for one in answers:
        if one.arm == SAMPLED:
            hits.setdefault(one.question_id, []).append(one.is_correct)
    return {question_id: _share(own) for question_id, own in hits.items()}


def _rates(answers: Sequence[Marked]) -> dict[str, Any]:
    return {
        "accuracy": _share([one.is_correct for one in answers]),
        "truncated_rate": _share([one.is_truncated for one in answers]),
        "format_rate": _share([one.is_formatted for one in answers]),
        "no_answer_rate": _share([one.answer == "" for one in answers]),
        "mean_tokens": _share([one.num_tokens for one in answers]),
    }


def _interval(answers: Sequence[Marked]) -> tuple[float, float]:
    return wilson(sum(one.is_correct for one in answers), len(answers))


def _at_each_k(
    samples: Sequence[Sequence[Marked]], rate: Callable[[Sequence[Marked], int], float]
) -> Mapping[str, dict[str, Any]]:
    found = {}
    for k in sizes(min(map(len, samples))) if samples else []:
        rates = [rate(own, k) for own in samples]
        found[str(k)] = {"rate": _share(rates), "interval": wilson(sum(rates), len(rates))}
    return found


def _pass_at(own: Sequence[Marked], k: int) -> float:
    return pass_at(sum(one.is_correct for one in own), len(own), k=k)


def _majority_at(own: Sequence[Marked], k: int) -> float:
    return majority_at([one.answer or None for one in own], [one.is_correct for one in own], k=k)


def _as_the_harness(greedy: Sequence[Marked]) -> dict[str, Any]:
    """The same texts as lm-evaluation-harness' `gsm8k_platinum` scores them, and how often that is our score."""
    found: dict[str, Any] = {}
    for name, read in (("strict-match", strict_match), ("flexible-extract", flexible_extract)):
        scores = [exact_match(read(one.text), one.solution) for one in greedy]
        agreeing = [score == one.is_correct for score, one in zip(scores, greedy, strict=True)]
        found[name] = {"accuracy": _share(scores), "agreement": _share(agreeing)}
    return found


def _share(values: Sequence[float]) -> float:
    return sum(values) / len(values)
