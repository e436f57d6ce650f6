"""Accuracy on held-out tasks: what training is for, with the interval that says how sure the number is.

Every number comes from one set of attempts, `num_samples` at each task. Intervals treat the tasks as the trials.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from syncline.envs.estimators import majority_at, pass_at, sizes, wilson
from syncline.errors import EngineTimeout, SynclineError
from syncline.protocols import Environment, Policy
from syncline.types import Rollout, RolloutStatus

Attempts = Sequence[Sequence[Rollout]]
"""By task."""


@dataclass(frozen=True, slots=True)
class LevelResult:
    num_scored: int
    accuracy: float


@dataclass(frozen=True, slots=True)
class AtK:
    """A rate of k samples a task, over the tasks that have k scored ones."""

    rate: float
    interval: tuple[float, float]
    num_tasks: int


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One evaluation, JSON-able with `dataclasses.asdict`. Rates and means are over the scored attempts."""

    environment: str
    split: str
    num_tasks: int
    num_samples: int
    """Attempts at each task."""
    num_scored: int
    """Attempts; the others ended in an error or were aborted, and `first_error` says how."""
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
    pass_at: Mapping[str, AtK]
    """By k, that one of k attempts is right; empty where the reward is not a yes or no."""
    majority_at: Mapping[str, AtK]
    """By k, that the most frequent answer is right; empty where the environment has no `answer(task, text)`."""


async def evaluate(
    environment: Environment,
    policy: Policy,
    *,
    num_tasks: int,
    name: str,
    timeout_seconds: float,
    num_samples: int = 1,
    split: str = "heldout",
    concurrency: int = 64,
) -> Evaluation:
    """`num_samples` attempts at each of the tasks 0 to `num_tasks` - 1, `concurrency` tasks at once.

    Raises `EngineTimeout` at the deadline, and `SynclineError` when not one attempt could be scored.
    """
    tasks = [environment.task(index, split=split) for index in range(num_tasks)]
    slots = asyncio.Semaphore(concurrency)

    async def attempt(task: Any) -> Sequence[Rollout]:
        async with slots:
            return await environment.rollouts(task, num_samples, policy)

    try:
        async with asyncio.timeout(timeout_seconds):
            attempts = await asyncio.gather(*(attempt(task) for task in tasks))
    except TimeoutError as error:
        fault = f"{num_tasks} {split} tasks of {name!r} were not done in {timeout_seconds:g} s"
        raise EngineTimeout(f"{fault}; raise engine.request_timeout_seconds, or evaluate fewer") from error
    return summarize(tasks, attempts, name=name, split=split, answer=getattr(environment, "answer", None))


def summarize(
    tasks: Sequence[Any],
    attempts: Attempts,
    *,
    name: str,
    split: str,
    answer: Callable[[Any, str], str | None] | None = None,
) -> Evaluation:
    """The numbers of the attempts at each task. `answer` reads an attempt's final answer off its last message."""
    everything = [rollout for own in attempts for rollout in own]
    first_error = next((r.error or str(r.status) for r in everything if r.reward is None), None)
    pairs = [(task, [r for r in own if r.reward is not None]) for task, own in zip(tasks, attempts, strict=True)]
    scored = [(task, own) for task, own in pairs if own]
    if not scored:
        raise SynclineError(f"none of {len(everything)} {split} attempts at {name!r} could be scored: {first_error}")
    kept = [rollout for _, own in scored for rollout in own]
    hits = [[_accuracy(rollout) for rollout in own] for _, own in scored]
    rates = [_mean(own) for own in hits]
    formats = [r.reward_parts["format"] for r in kept if "format" in r.reward_parts]
    is_binary = {hit for own in hits for hit in own} <= {0.0, 1.0}
    return Evaluation(
        environment=name,
        split=split,
        num_tasks=len(tasks),
        num_samples=max(map(len, attempts)),
        num_scored=len(kept),
        first_error=first_error,
        reward=_mean([r.reward for r in kept if r.reward is not None]),
        accuracy=_mean(rates),
        interval=wilson(sum(rates), len(rates)) if is_binary else None,
        mean_length=_mean([sum(s.num_sampled for s in r.samples) for r in kept]),
        truncated_rate=_mean([r.status is RolloutStatus.TRUNCATED for r in kept]),
        format_rate=_mean(formats) if formats else None,
        levels=_by_level([(getattr(task, "level", None), rate) for (task, _), rate in zip(scored, rates, strict=True)]),
        pass_at=_at_each_k(hits, lambda i, k: pass_at(int(sum(hits[i])), len(hits[i]), k=k)) if is_binary else {},
        majority_at=_majorities(scored, hits, answer) if is_binary and answer else {},
    )


def _majorities(
    scored: Sequence[tuple[Any, Sequence[Rollout]]],
    hits: Sequence[Sequence[float]],
    answer: Callable[[Any, str], str | None],
) -> dict[str, AtK]:
    answers = [[answer(task, said) if (said := _said(r)) is not None else None for r in own] for task, own in scored]
    return _at_each_k(hits, lambda i, k: majority_at(answers[i], [hit == 1.0 for hit in hits[i]], k=k))


def _said(rollout: Rollout) -> str | None:
    """The final answer; `None` where somebody else had the last word, as when the turns are used up."""
    last = rollout.messages[-1:]
    return last[0].content if last and last[0].role == "assistant" else None


def _at_each_k(hits: Sequence[Sequence[float]], rate: Callable[[int, int], float]) -> dict[str, AtK]:
    """`rate(i, k)` is task i's; a task with fewer than k scored attempts says nothing about k."""
    found: dict[str, AtK] = {}
    for k in sizes(max(map(len, hits))):
        rates = [rate(i, k) for i, own in enumerate(hits) if len(own) >= k]
        found[str(k)] = AtK(_mean(rates), wilson(sum(rates), len(rates)), len(rates))
    return found


def _accuracy(rollout: Rollout) -> float:
    """1 or 0 where the environment says `correct`, the reward where it does not."""
    if "correct" in rollout.reward_parts:
        return float(rollout.reward_parts["correct"] == 1)
    return float(rollout.reward or 0.0)


def _by_level(rates: Sequence[tuple[str | None, float]]) -> dict[str, LevelResult]:
    labels = sorted({str(level) for level, _ in rates if level is not None})
    chosen = {label: [rate for level, rate in rates if str(level) == label] for label in labels}
    return {label: LevelResult(len(values), _mean(values)) for label, values in chosen.items()}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
