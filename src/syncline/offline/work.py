"""What a collection has to sample: (question, arm, sample) and the seed that follows from them, round by round.

Everything here follows from configuration, questions and the answers so far, so a killed collection that reads its
answers back stands exactly where it stood.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from syncline.config.offline_collect import Collect
from syncline.offline.answers import ANSWER_RULES, number
from syncline.offline.arithmetic import Counterfactual, counterfactual
from syncline.offline.arms import Arm, arms_of
from syncline.offline.questions import Question
from syncline.offline.records import TWIN
from syncline.types import Message


@dataclass(frozen=True, slots=True)
class WorkItem:
    """One completion to sample. Of a twin, `question` and `gold` are the changed ones."""

    question_id: str
    question: str
    gold: str
    arm: Arm
    sample: int
    run_seed: int

    @property
    def key(self) -> str:
        return f"{self.question_id}/{self.arm.name}/{self.sample}"

    @property
    def seed(self) -> int:
        """31 bits, of run and key alone; a twin's is its original's, so that the changed number is all that differs."""
        key = self.key.replace(f"{TWIN}/", "/")
        return int.from_bytes(hashlib.sha256(f"{self.run_seed}/{key}".encode()).digest()[:4]) >> 1

    @property
    def prompt(self) -> tuple[Message, ...]:
        return self.arm.prompt(self.question)

    @property
    def is_twin(self) -> bool:
        return self.arm.name.endswith(TWIN)


@dataclass(slots=True)
class _Standing:
    """How far a question is."""

    rounds: int = 0
    outstanding: set[str] = field(default_factory=set)
    answers: list[tuple[str, bool]] = field(default_factory=list)


class Workload:
    """`first()` is due at once; `finished(item, text)` says what is due because of it."""

    def __init__(self, questions: Sequence[Question], asked: Collect, *, seed: int) -> None:
        arms = arms_of(asked.coherence, prompt=asked.prompt)
        if asked.coherence == "v2" and not asked.rephrase:
            arms = tuple(arm for arm in arms if not arm.rephrases)
        self.arms = tuple(_as_asked(arm, asked) for arm in arms)
        self.questions = {question.question_id: question for question in questions}
        self.changed = {q.question_id: _changed(q) for q in questions} if asked.coherence == "v2" else {}
        """By question, the counterfactual that its solution allows, or `None`."""
        self._asked = asked
        self._seed = seed
        self._rule = ANSWER_RULES[asked.coherence]
        self._standings = {question_id: _Standing() for question_id in self.questions}

    def first(self) -> list[WorkItem]:
        return [item for question in self.questions.values() for item in self._next_round(question)]

    def finished(self, item: WorkItem, text: str) -> list[WorkItem]:
        """The question's next round once this one's last answer is there, if its answers are mixed."""
        standing = self._standings[item.question_id]
        standing.outstanding.remove(item.key)
        if not item.is_twin:
            standing.answers.append((self._rule.answer(text), self.is_correct(item, text)))
        if standing.outstanding or standing.rounds >= self._asked.max_rounds or _is_settled(standing.answers):
            return []
        return self._next_round(self.questions[item.question_id])

    def is_correct(self, item: WorkItem, text: str) -> bool:
        expected = self._rule.answer(item.gold if item.is_twin else self.questions[item.question_id].solution)
        return expected != "" and self._rule.answer(text) == expected

    def answer(self, text: str) -> str:
        return self._rule.answer(text)

    def counts(self) -> dict[str, int]:
        """Questions by what the answers so far made of them."""
        standings = self._standings.values()
        spared = sum(self._asked.max_rounds - s.rounds for s in standings)
        per_round = sum(arm.num_samples for arm in self.arms)
        return {
            "questions": len(standings),
            "settled_early": sum(s.rounds < self._asked.max_rounds for s in standings),
            "asked_again": sum(s.rounds > 1 for s in standings),
            "spared_samples": spared * per_round,
        }

    def _next_round(self, question: Question) -> list[WorkItem]:
        standing = self._standings[question.question_id]
        items = list(self._round(question, standing.rounds))
        standing.rounds += 1
        standing.outstanding.update(item.key for item in items)
        return items

    def _round(self, question: Question, index: int) -> Iterator[WorkItem]:
        changed = self.changed.get(question.question_id)
        for arm in self.arms:
            for sample in range(index * arm.num_samples, (index + 1) * arm.num_samples):
                own = WorkItem(question.question_id, question.question, question.gold, arm, sample, self._seed)
                yield own
                if changed is not None and sample < self._asked.num_twins:
                    twin = replace(arm, name=arm.name + TWIN)
                    yield replace(own, arm=twin, question=changed.question, gold=str(changed.answer))


def _as_asked(arm: Arm, asked: Collect) -> Arm:
    return replace(
        arm,
        num_samples=asked.num_samples or arm.num_samples,
        temperature=arm.temperature if asked.temperature is None else asked.temperature,
    )


def _changed(question: Question) -> Counterfactual | None:
    answer = number(question.gold)
    return None if answer is None else counterfactual(question.question, question.solution, answer)


def _is_settled(answers: Sequence[tuple[str, bool]]) -> bool:
    """All right, or all the same answer: another round would tell nothing."""
    return all(correct for _, correct in answers) or len({answer for answer, _ in answers}) == 1
