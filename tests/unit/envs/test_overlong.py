import asyncio
from dataclasses import replace

import pytest

from syncline.config.schema import Overlong
from syncline.envs.overlong import SoftLengthLimit, longest_turn, punishment
from syncline.types import Rollout, RolloutStatus, TrainingSample, VersionSpan


@pytest.mark.parametrize(
    ("length", "expected"),
    [(0, 0.0), (16, 0.0), (17, -0.25), (18, -0.5), (19, -0.75), (20, -1.0), (21, -1.0), (400, -1.0)],
)
def test_the_papers_equation_by_hand(length: int, expected: float) -> None:
    """Limit 20, cache 4: nothing up to 16, then (16 - length) / 4."""
    assert punishment(length, Overlong(cache_tokens=4), max_tokens=20) == expected
    assert punishment(length, Overlong(cache_tokens=4, penalty=0.5), max_tokens=20) == expected / 2


def test_the_longest_turn_counts_and_not_the_sum_of_all() -> None:
    assert longest_turn(tuple(mark == "#" for mark in "..###.#####..##")) == 5
    assert longest_turn((False, False)) == 0


def attempt(reward: float | None, *lengths: int) -> Rollout:
    samples = tuple(
        TrainingSample((7,) * (n + 1), (False,) + (True,) * n, (0.0,) + (-1.0,) * n, (VersionSpan(0, 1, n + 1),))
        for n in lengths
    )
    if reward is None:
        return Rollout(samples, None, RolloutStatus.ERROR, error="made to fail")
    return Rollout(samples, reward, RolloutStatus.COMPLETED, {"correct": reward})


class Prepared:
    """An environment that answers with these rollouts."""

    name = "prepared"

    def __init__(self, *rollouts: Rollout) -> None:
        self._rollouts = rollouts

    def task(self, index: int, *, split: str = "train") -> tuple[int, str]:
        return index, split

    async def rollouts(self, task: object, num_rollouts: int, policy: object) -> list[Rollout]:
        return list(self._rollouts[:num_rollouts])


def test_rewards_and_parts_are_shaped_and_an_error_stays_one() -> None:
    inner = (attempt(1.0, 10), attempt(1.0, 18), attempt(0.0, 3, 20), attempt(None, 20))
    environment = SoftLengthLimit(Prepared(*inner), Overlong(cache_tokens=4), max_tokens=20)
    shaped = asyncio.run(environment.rollouts(None, 4, policy=None))  # type: ignore[arg-type]
    assert [rollout.reward for rollout in shaped] == [1.0, 0.5, -1.0, None]
    assert [rollout.reward_parts.get("overlong") for rollout in shaped] == [0.0, -0.5, -1.0, None]
    assert [rollout.reward_parts.get("correct") for rollout in shaped] == [1.0, 1.0, 0.0, None]
    assert [replace(s, reward=i.reward, reward_parts=i.reward_parts) for s, i in zip(shaped, inner, strict=True)] == [
        *inner
    ]
    assert (environment.name, environment.task(3, split="heldout")) == ("prepared", (3, "heldout"))
