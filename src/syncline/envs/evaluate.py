"""Accuracy on held-out tasks: what training is for, with the interval that says how sure the number is."""

import asyncio
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from syncline.errors import EngineTimeout, SynclineError
from syncline.protocols import Environment, Policy
from syncline.types import Rollout, RolloutStatus

Z_95 = 1.959964
"""Standard normal quantile of a two-sided 95 % interval."""


@dataclass(frozen=True, slots=True)
class LevelResult:
    num_scored: int
    accuracy: float


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One evaluation, JSON-able with `dataclasses.asdict`. Rates and means are over the scored tasks."""

    environment: str
    split: str
    num_tasks: int
    num_scored: int
    """The other attempts ended in an error or were aborted; `first_error` says how."""
    first_error: str | None
    reward: float
    accuracy: float
    """Share of answers with the part `correct` equal to 1; the mean reward where the environment has no such part."""
    interval: tuple[float, float] | None
    """Wilson 95 % interval of `accuracy`; absent where the reward is not a yes or no."""
    mean_length: float
    """Sampled tokens."""
    truncated_rate: float
    format_rate: float | None
    """Mean of the part `format`; absent where the environment has no such part."""
    levels: Mapping[str, LevelResult]
    """By the task's `level`; empty where tasks have none."""


async def evaluate(
    environment: Environment,
    policy: Policy,
    *,
    num_tasks: int,
    name: str,
    timeout_seconds: float,
    split: str = "heldout",
    concurrency: int = 64,
) -> Evaluation:
    """One attempt at each of the tasks 0 to `num_tasks` - 1.

    Raises `EngineTimeout` at the deadline, and `SynclineError` when not one attempt could be scored.
    """
    tasks = [environment.task(index, split=split) for index in range(num_tasks)]
    slots = asyncio.Semaphore(concurrency)

    async def attempt(task: Any) -> Rollout:
        async with slots:
            return (await environment.rollouts(task, 1, policy))[0]

    try:
        async with asyncio.timeout(timeout_seconds):
            rollouts = await asyncio.gather(*(attempt(task) for task in tasks))
    except TimeoutError as error:
        raise EngineTimeout(f"{num_tasks} {split} tasks of {name!r} were not done in {timeout_seconds:g} s") from error
    return summarize(tasks, rollouts, name=name, split=split)


def summarize(tasks: Sequence[Any], rollouts: Sequence[Rollout], *, name: str, split: str) -> Evaluation:
    """The numbers of one rollout a task."""
    scored = [(task, rollout) for task, rollout in zip(tasks, rollouts, strict=True) if rollout.reward is not None]
    first_error = next((r.error or str(r.status) for r in rollouts if r.reward is None), None)
    if not scored:
        raise SynclineError(f"none of {len(rollouts)} {split} tasks of {name!r} could be scored: {first_error}")
    kept = [rollout for _, rollout in scored]
    hits = [_accuracy(rollout) for rollout in kept]
    formats = [r.reward_parts["format"] for r in kept if "format" in r.reward_parts]
    return Evaluation(
        environment=name,
        split=split,
        num_tasks=len(rollouts),
        num_scored=len(kept),
        first_error=first_error,
        reward=_mean([r.reward for r in kept if r.reward is not None]),
        accuracy=_mean(hits),
        interval=wilson(int(sum(hits)), len(hits)) if set(hits) <= {0.0, 1.0} else None,
        mean_length=_mean([sum(s.num_sampled for s in r.samples) for r in kept]),
        truncated_rate=_mean([r.status is RolloutStatus.TRUNCATED for r in kept]),
        format_rate=_mean(formats) if formats else None,
        levels=_by_level([(getattr(task, "level", None), hit) for (task, _), hit in zip(scored, hits, strict=True)]),
    )


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """Score interval of a proportion at 95 % (Wilson 1927, JASA 22, eq. for p̂ ± z): never outside [0, 1]."""
    share, z2 = successes / trials, Z_95**2
    center = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    half = Z_95 / (1 + z2 / trials) * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials**2))
    return max(0.0, center - half), min(1.0, center + half)


def _accuracy(rollout: Rollout) -> float:
    """1 or 0 where the environment says `correct`, the reward where it does not."""
    if "correct" in rollout.reward_parts:
        return float(rollout.reward_parts["correct"] == 1)
    return float(rollout.reward or 0.0)


def _by_level(hits: Sequence[tuple[str | None, float]]) -> dict[str, LevelResult]:
    labels = sorted({str(level) for level, _ in hits if level is not None})
    chosen = {label: [hit for level, hit in hits if str(level) == label] for label in labels}
    return {label: LevelResult(len(values), _mean(values)) for label, values in chosen.items()}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
