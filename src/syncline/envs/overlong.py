"""Around any environment: completions that come close to the length limit earn less, before they are cut off."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

from syncline.config.schema import Overlong
from syncline.protocols import Environment, Policy
from syncline.types import Rollout

PART = "overlong"
"""Its name among the parts of the reward."""


class SoftLengthLimit:
    """The environment's own rollouts, the soft overlong punishment added to their rewards and reward parts."""

    def __init__(self, environment: Environment, overlong: Overlong, *, max_tokens: int) -> None:
        """`max_tokens` bounds each completion."""
        self.name = environment.name
        self.num_train_tasks: int | None = getattr(environment, "num_train_tasks", None)
        self._environment = environment
        self._overlong = overlong
        self._max_tokens = max_tokens

    def task(self, index: int, *, split: str = "train") -> Any:
        return self._environment.task(index, split=split)

    async def rollouts(self, task: Any, num_rollouts: int, policy: Policy) -> list[Rollout]:
        attempts = await self._environment.rollouts(task, num_rollouts, policy)
        return [self._shaped(attempt) for attempt in attempts]

    def _shaped(self, rollout: Rollout) -> Rollout:
        if rollout.reward is None:
            return rollout
        length = max((longest_turn(sample.loss_mask) for sample in rollout.samples), default=0)
        added = punishment(length, self._overlong, max_tokens=self._max_tokens)
        return replace(rollout, reward=rollout.reward + added, reward_parts={**rollout.reward_parts, PART: added})


def punishment(length: int, overlong: Overlong, *, max_tokens: int) -> float:
    """DAPO's soft overlong punishment of a completion of `length` tokens (arXiv 2503.14476 §3.4, eq. 13).

    With L = `max_tokens` and C = `cache_tokens`: 0 up to L - C, then (L - C - length) / C, which is -1 at L and for
    whatever is longer; all of it times `penalty`.
    """
    over = length - (max_tokens - overlong.cache_tokens)
    return -overlong.penalty * min(1.0, max(0.0, over / overlong.cache_tokens))


def longest_turn(loss_mask: Sequence[bool]) -> int:
    """Tokens of the longest completion in a sample: the limit is on each turn, not on their sum."""
    return max((sum(1 for _ in turn) for sampled, turn in groupby(loss_mask) if sampled), default=0)
