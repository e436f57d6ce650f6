"""Tasks without a right answer: rows with a `prompt`, answers graded or compared by a judge model (`envs/judge.py`).

`mode: grade` gives each answer a grade of its own; `mode: preference` compares it with `num_opponents` of its siblings,
and the reward is the share it won. A row's `reference`, where there is one, is shown to the judge as a good answer.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from syncline.envs.conversation import Conversation, converse, together
from syncline.envs.judge import Endpoint, Judge
from syncline.envs.rows import PromptRow, Rows, open_rows, prompt_row
from syncline.envs.scoring import Score, boundary
from syncline.errors import ConfigError
from syncline.protocols import Policy
from syncline.types import FinishReason, Rollout

MODES = ("grade", "preference")
RUBRIC = "A good answer is correct, does what was asked, and is no longer than it has to be."


class Judged:
    """`judge` are `Endpoint`'s fields; `rubric` says in words what is good. The reward's part is named as the mode."""

    name = "judged"

    def __init__(
        self,
        *,
        judge: Mapping[str, Any],
        path: str | None = None,
        heldout_path: str | None = None,
        mode: str = "grade",
        rubric: str = RUBRIC,
        num_opponents: int = 2,
        seed: int = 0,
    ) -> None:
        if mode not in MODES:
            raise ConfigError([f"mode: {mode!r} is not one of {', '.join(MODES)}"])
        if num_opponents < 1:
            raise ConfigError([f"num_opponents: {num_opponents} must be >= 1"])
        try:
            endpoint = Endpoint(**judge)
        except TypeError as error:
            raise ConfigError([f"judge: {error}; it takes {', '.join(Endpoint.__dataclass_fields__)}"]) from error
        self.open_judge: Callable[[], Judge] = lambda: Judge(endpoint, rubric=rubric)
        self._mode, self._num_opponents = mode, num_opponents
        train, heldout = open_rows(path, heldout_path, hub=None)
        self._rows = Rows(train, heldout, build=prompt_row, key=lambda row: row.key, seed=seed)
        self.num_train_tasks = len(self._rows.train)

    def task(self, index: int, *, split: str = "train") -> PromptRow:
        return self._rows.task(index, split=split)

    async def rollouts(self, task: PromptRow, num_rollouts: int, policy: Policy) -> list[Rollout]:
        attempts = await converse(policy, task.messages, num_rollouts)
        alive = [a for a in attempts if a.fault is None and a.finish_reason is not FinishReason.ABORT]
        async with self.open_judge() as judge:
            outcomes = await together([self._outcome(judge, task, a, alive) for a in attempts])
        return [attempt.rollout(*outcome) for attempt, outcome in zip(attempts, outcomes, strict=True)]

    async def _outcome(
        self, judge: Judge, task: PromptRow, attempt: Conversation, alive: Sequence[Conversation]
    ) -> tuple[Score, None] | tuple[None, str | None]:
        if attempt not in alive:
            return None, None
        value, fault = await boundary("judge", lambda: self._judged(judge, _shown(task), attempt, alive))
        return (Score(value, {self._mode: value}), None) if value is not None else (None, fault)

    async def _judged(self, judge: Judge, shown: str, attempt: Conversation, alive: Sequence[Conversation]) -> float:
        if self._mode == "grade":
            return await judge.grade(shown, attempt.answer)
        place = alive.index(attempt)
        others = [alive[(place + step) % len(alive)] for step in range(1, min(self._num_opponents, len(alive) - 1) + 1)]
        if not others:
            raise ValueError("there is no other answer to compare with")
        won = await together([judge.prefer(shown, attempt.answer, other.answer) for other in others])
        return sum(won) / len(won)


def _shown(task: PromptRow) -> str:
    said = "\n".join(f"{m.role}: {m.content}" for m in task.messages)
    reference = task.columns.get("reference")
    return f"{said}\n\n# A good answer\n{reference}" if reference else said
