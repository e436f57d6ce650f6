"""Attempts → scored trajectories: a question's attempts together, by the version that was asked for."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import groupby
from typing import Any

from syncline.offline.coherence import Solution, score_coherence
from syncline.offline.records import TWIN, Attempt, Trajectory
from syncline.offline.regime_w import VERSIONS, score_question
from syncline.offline.regime_w import Attempt as Scored
from syncline.offline.work import WorkItem, Workload


def score_attempts(
    attempts: Iterable[tuple[WorkItem, Attempt]], workload: Workload, coherence: str
) -> Iterator[Trajectory]:
    """In the order of questions, arms and samples; a question's twins after its attempts."""
    by_question: Mapping[str, list[tuple[WorkItem, Attempt]]] = defaultdict(list)
    for item, attempt in attempts:
        by_question[item.question_id].append((item, attempt))
    places = {arm.name: i for i, arm in enumerate(workload.arms)}
    for question_id in workload.questions:
        ordered = sorted(by_question[question_id], key=lambda pair: _place(pair[0], places))
        own = [pair for pair in ordered if not pair[0].is_twin]
        twins = [pair for pair in ordered if pair[0].is_twin]
        yield from _scored(own, _scores(own, twins, workload, coherence), workload)
        yield from _scored(twins, [{"reward": float(workload.is_correct(i, a.text))} for i, a in twins], workload)


def _place(item: WorkItem, places: Mapping[str, int]) -> tuple[int, int]:
    return places[item.arm.name.removesuffix(TWIN)], item.sample


def _scores(
    own: Sequence[tuple[WorkItem, Attempt]],
    twins: Sequence[tuple[WorkItem, Attempt]],
    workload: Workload,
    coherence: str,
) -> Sequence[Mapping[str, float | None]]:
    question_id = own[0][0].question_id
    if coherence == "v2":
        twin_answers = {item.key.replace(f"{TWIN}/", "/"): workload.answer(attempt.text) for item, attempt in twins}
        solutions = [
            Solution(
                attempt.text,
                workload.answer(attempt.text),
                workload.is_correct(item, attempt.text),
                item.arm.rephrases,
                twin_answers.get(item.key),
            )
            for item, attempt in own
        ]
        return score_coherence(solutions, workload.changed[question_id])
    texts = [Scored.of(attempt.text, item.arm.name) for item, attempt in own]
    measured, rewards = score_question(texts, workload.questions[question_id].solution, VERSIONS[coherence])
    return [asdict(measured) | {"reward": reward} for reward in rewards]


def _scored(
    pairs: Sequence[tuple[WorkItem, Attempt]], scores: Sequence[Mapping[str, float | None]], workload: Workload
) -> Iterator[Trajectory]:
    for (item, attempt), own in zip(pairs, scores, strict=True):
        told: dict[str, Any] = {
            "answer": workload.answer(attempt.text),
            "correct": workload.is_correct(item, attempt.text),
            "scores": own,
        }
        yield Trajectory.model_validate(attempt.model_dump() | told)


def aurocs(rollouts: Sequence[Trajectory]) -> dict[str, float]:
    """Of each score but the reward against correctness: the chance that a right trajectory's is above a wrong one's,
    ties half (Mann-Whitney U). Left out: twins, and scores that only right ones or only wrong ones have."""
    own = [one for one in rollouts if not one.is_twin]
    names = {name for one in own for name in one.scores} - {"reward"}
    found: dict[str, float] = {}
    for name in sorted(names):
        told = sorted((score, one.correct) for one in own if (score := one.scores.get(name)) is not None)
        num_right = sum(correct for _, correct in told)
        num_pairs = num_right * (len(told) - num_right)
        if num_pairs:
            found[name] = _wins(told) / num_pairs
    return found


def _wins(told: Sequence[tuple[float, bool]]) -> float:
    """Over all pairs of a right and a wrong one; `told` in the order of scores."""
    wins, wrong_below = 0.0, 0
    for _, group in groupby(told, key=lambda pair: pair[0]):
        correct = [right for _, right in group]
        num_right = sum(correct)
        num_wrong = len(correct) - num_right
        wins += num_right * (wrong_below + num_wrong / 2)
        wrong_below += num_wrong
    return wins
