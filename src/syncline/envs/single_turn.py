"""The usual environment: one prompt, one answer, one score. A subclass writes `task`, `prompt` and `score`.

`rollouts` samples the whole group in one call, so that the engine computes the prompt once, and makes every
completion a `Rollout`. What a subclass's code raises is caught at one named boundary and becomes a status.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from syncline.errors import ConfigError, EngineError
from syncline.protocols import Policy
from syncline.types import Completion, FinishReason, Message, Rollout, RolloutStatus, TrainingSample

SPLITS = ("train", "heldout")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Score:
    """The reward of an answer and what it is made of: `Score(1.1, {"correct": 1.0, "format": 1.0})`."""

    reward: float
    parts: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, value in {"reward": self.reward, **self.parts}.items():
            if not math.isfinite(value):
                raise ValueError(f"{name} must be finite, got {value}")


class SingleTurn(ABC):
    """An `Environment` of one prompt and one answer; a subclass sets `name` and writes the three methods."""

    name: str

    @abstractmethod
    def task(self, index: int, *, split: str = "train") -> Any:
        """A pure function of the constructor's arguments, `index` and `split`; the splits share no task."""

    @abstractmethod
    def prompt(self, task: Any) -> Sequence[Message]: ...

    @abstractmethod
    def score(self, task: Any, text: str) -> Score:
        """Any text may come: a wrong or garbled answer is a low score, not an exception."""

    async def rollouts(self, task: Any, num_rollouts: int, policy: Policy) -> list[Rollout]:
        """`num_rollouts` attempts. A prompt that cannot be built or does not fit is `ERROR` for all of them."""
        messages, fault = boundary("prompt", lambda: tuple(self.prompt(task)))
        if messages is None:
            return [_failed(fault)] * num_rollouts
        prompt_token_ids, fault = boundary("encode", lambda: policy.encode(messages))
        if prompt_token_ids is None:
            return [_failed(fault, messages)] * num_rollouts
        completions = await policy.sample(prompt_token_ids, num_completions=num_rollouts)
        attempts = [(completion, policy.decode(completion.token_ids)) for completion in completions]
        return [self._rollout(task, messages, prompt_token_ids, attempt) for attempt in attempts]

    def _rollout(
        self,
        task: Any,
        messages: tuple[Message, ...],
        prompt_token_ids: tuple[int, ...],
        attempt: tuple[Completion, str],
    ) -> Rollout:
        completion, text = attempt
        if completion.token_ids and not completion.versions:
            raise EngineError("the engine sampled without a policy version: nothing has been published to it yet")
        samples = (TrainingSample.from_completion(prompt_token_ids, completion),)
        messages = (*messages, Message("assistant", text))
        if completion.finish_reason is FinishReason.ABORT:
            return Rollout(
                samples, None, RolloutStatus.ABORTED, messages=messages, error="the engine aborted the request"
            )
        score, fault = boundary("score", lambda: _checked(self.score(task, text)))
        if score is None:
            return Rollout(samples, None, RolloutStatus.ERROR, messages=messages, error=fault)
        length = completion.finish_reason is FinishReason.LENGTH
        status = RolloutStatus.TRUNCATED if length else RolloutStatus.COMPLETED
        return Rollout(samples, score.reward, status, score.parts, messages)


def boundary(what: str, call: Callable[[], T]) -> tuple[T, None] | tuple[None, str]:
    """What the call returns, or what escaped from it in words. The room's only `except Exception`."""
    try:
        return call(), None
    except Exception as error:
        return None, f"{what} raised {type(error).__name__}: {error}"


def check_split(split: str) -> None:
    if split not in SPLITS:
        raise ConfigError([f"split: {split!r} is not one of {', '.join(SPLITS)}"])


def check_weights(weights: Mapping[str, float], *, parts: Sequence[str]) -> dict[str, float]:
    """The weights as given. Raises `ConfigError` for a part that does not exist or a weight that is not finite."""
    unknown = [name for name in weights if name not in parts]
    if unknown or not weights:
        raise ConfigError([f"weights: {dict(weights)} must weigh parts of the reward: {', '.join(parts)}"])
    for name, weight in weights.items():
        if not isinstance(weight, int | float) or not math.isfinite(weight):
            raise ConfigError([f"weights.{name}: {weight!r} must be a finite number"])
    return dict(weights)


def weighted_score(parts: Mapping[str, float], weights: Mapping[str, float]) -> Score:
    """The reward is the weighted sum of the parts; a part without a weight is reported only."""
    return Score(sum(weight * parts[name] for name, weight in weights.items()), parts)


def _checked(score: Score) -> Score:
    if not isinstance(score, Score):
        raise TypeError(f"score() must return a Score, got {score!r}")
    return score


def _failed(fault: str | None, messages: tuple[Message, ...] = ()) -> Rollout:
    return Rollout((), None, RolloutStatus.ERROR, messages=messages, error=fault)
