"""What an answer is worth: a reward and its parts. A score that cannot be given is a fault in words, never a 0."""

import inspect
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from syncline.errors import ConfigError, EngineError

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


async def boundary(what: str, call: Callable[[], T | Awaitable[T]]) -> tuple[T, None] | tuple[None, str]:
    """What the call returns, or what escaped from it in words. The room's only `except Exception`.

    An engine's fault is not the environment's: it goes on up, so that the group is sampled again.
    """
    try:
        value: Any = call()
        return (await value if inspect.isawaitable(value) else value), None
    except EngineError:
        raise
    except Exception as error:
        return None, f"{what} raised {in_words(error)}"


def in_words(error: BaseException) -> str:
    """Words that every wire and file can take, whatever halves of characters the error quotes."""
    return f"{type(error).__name__}: {error}".encode(errors="backslashreplace").decode()


def checked(score: object) -> Score:
    if not isinstance(score, Score):
        raise TypeError(f"score() must return a Score, got {score!r}")
    return score


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
