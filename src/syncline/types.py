"""The one data type: what a rollout is, the same in memory, on the wire and on disk.

`RolloutGroup` (siblings of one task: the unit queued, leased, trained on, dropped)
  > `Rollout` (one attempt: reward or `None`, status, reward parts, messages for people)
    > `TrainingSample` (one token sequence, with the policy version of every sampled token).

Every class checks itself when built, so a value that exists is a valid value; a fault is a
`ValueError` naming the field. Tensors live in the learner only.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum


class RolloutStatus(StrEnum):
    """How an attempt ended. Only `ERROR` and `ABORTED` carry the reward `None`."""

    COMPLETED = "completed"
    TRUNCATED = "truncated"
    ABORTED = "aborted"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class VersionSpan:
    """Tokens `[start, end)` of a sample were sampled under `policy_version`."""

    policy_version: int
    start: int
    end: int

    def __post_init__(self) -> None:
        if self.policy_version < 0:
            raise ValueError(f"policy_version must be >= 0, got {self.policy_version}")
        if not 0 <= self.start < self.end:
            raise ValueError(f"version span needs 0 <= start < end, got [{self.start}, {self.end})")


@dataclass(frozen=True, slots=True)
class ImageRef:
    """An image by where its file lies and what is in it. Rollouts carry these, never pixels: every process that needs
    the pixels reads the file, once for a whole group, and refuses one whose bytes are no longer those."""

    path: str
    sha256: str
    """Of the file's bytes, in hex."""

    def __post_init__(self) -> None:
        if not self.path:
            raise ValueError("path must not be empty")
        if len(self.sha256) != 64 or not set(self.sha256) <= set("0123456789abcdef"):
            raise ValueError(f"sha256 must be 64 hex digits, got {self.sha256!r}")


@dataclass(frozen=True, slots=True)
class Message:
    """One chat turn, as people read it."""

    role: str
    content: str
    images: tuple[ImageRef, ...] = ()
    """Shown before the text, in order."""

    def __post_init__(self) -> None:
        try:
            self.content.encode()
        except (AttributeError, UnicodeEncodeError) as error:
            raise ValueError(f"content must be a text that can be written as UTF-8: {error}") from error


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the engine samples. `max_tokens` bounds the completion, not the whole sequence."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    """0 keeps the whole vocabulary."""
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    """Beside the model's own end-of-sequence tokens."""

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be >= 1, got {self.max_tokens}")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature must be finite and >= 0, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be >= 0, got {self.top_k}")


class FinishReason(StrEnum):
    """Why the engine stopped: an end token, the length limit, or an abort."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"


@dataclass(frozen=True, slots=True)
class Completion:
    """What the engine answers for one sampled sequence (prompt excluded).

    `logprobs[i]` is the log-probability of `token_ids[i]` under the distribution it was drawn from
    (temperature applied). `versions` are spans over `token_ids`; an engine that has not had a policy
    published yet answers with an empty tuple.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    versions: tuple[VersionSpan, ...]
    finish_reason: FinishReason
    prompt_token_ids: tuple[int, ...] = ()
    """The prompt as the engine read it, with as many placeholders as each image has; empty: as it was given."""

    def __post_init__(self) -> None:
        if len(self.token_ids) != len(self.logprobs):
            raise ValueError(f"{len(self.token_ids)} token_ids but {len(self.logprobs)} logprobs")
        _check_finite("logprobs", self.logprobs)
        if self.versions:
            _check_cover(self.versions, (True,) * len(self.token_ids))


class Lack(StrEnum):
    """What the one who sampled did not record: only samples that came over another framework's wire lack anything."""

    LOGPROBS = "logprobs"
    VERSIONS = "versions"


@dataclass(frozen=True, slots=True)
class TrainingSample:
    """One token sequence the learner can train on.

    `loss_mask[i]` is true where `token_ids[i]` was sampled by the policy. `logprobs[i]` is the sampler's
    log-probability there and 0.0 elsewhere. `versions` cover exactly the sampled tokens, in order;
    a span may not cross a token that was not sampled. Where `lacks` says so, `logprobs` are 0.0 throughout
    and `versions` empty; `learner.unrecorded` decides what becomes of such a sample.
    """

    token_ids: tuple[int, ...]
    loss_mask: tuple[bool, ...]
    logprobs: tuple[float, ...]
    versions: tuple[VersionSpan, ...]
    lacks: tuple[Lack, ...] = ()
    images: tuple[ImageRef, ...] = ()
    """What the placeholders among the tokens stand for, in order: as many placeholders as each image has."""

    def __post_init__(self) -> None:
        n = len(self.token_ids)
        if n == 0:
            raise ValueError("token_ids must not be empty")
        for name, values in (("loss_mask", self.loss_mask), ("logprobs", self.logprobs)):
            if len(values) != n:
                raise ValueError(f"{n} token_ids but {len(values)} {name}")
        if min(self.token_ids) < 0:
            raise ValueError(f"token_ids must be >= 0, got {min(self.token_ids)}")
        if self.loss_mask[0]:
            raise ValueError("loss_mask[0] must be false: the first token of a sequence has no prediction")
        _check_finite("logprobs", self.logprobs)
        if Lack.LOGPROBS in self.lacks and any(self.logprobs):
            raise ValueError("logprobs must be 0.0 throughout a sample that lacks them")
        if Lack.VERSIONS in self.lacks:
            if self.versions:
                raise ValueError("versions must be empty in a sample that lacks them")
        else:
            _check_cover(self.versions, self.loss_mask)

    @property
    def num_sampled(self) -> int:
        return sum(self.loss_mask)

    @classmethod
    def from_completion(
        cls, prompt_token_ids: tuple[int, ...], completion: Completion, *, images: tuple[ImageRef, ...] = ()
    ) -> "TrainingSample":
        """A prompt as the engine read it, then what was sampled. With `extended` the one way tokens enter a sample."""
        return cls._joined((), (), (), (), images, given=prompt_token_ids, completion=completion)

    def extended(
        self, given: tuple[int, ...], completion: Completion, *, images: tuple[ImageRef, ...] = ()
    ) -> "TrainingSample":
        """The next turn: `given` tokens that nobody sampled, with their own images, then what was. What is here already
        stays as it is."""
        own = (self.token_ids, self.loss_mask, self.logprobs, self.versions, self.images + images)
        return self._joined(*own, given=given, completion=completion)

    @classmethod
    def _joined(
        cls,
        token_ids: tuple[int, ...],
        loss_mask: tuple[bool, ...],
        logprobs: tuple[float, ...],
        versions: tuple[VersionSpan, ...],
        images: tuple[ImageRef, ...],
        *,
        given: tuple[int, ...],
        completion: Completion,
    ) -> "TrainingSample":
        start = len(token_ids) + len(given)
        return cls(
            token_ids=(*token_ids, *given, *completion.token_ids),
            loss_mask=loss_mask + (False,) * len(given) + (True,) * len(completion.token_ids),
            logprobs=logprobs + (0.0,) * len(given) + completion.logprobs,
            versions=versions
            + tuple(VersionSpan(s.policy_version, s.start + start, s.end + start) for s in completion.versions),
            images=images,
        )


@dataclass(frozen=True, slots=True)
class Rollout:
    """One attempt at a task. An error has a status and the reward `None`: never reward 0."""

    samples: tuple[TrainingSample, ...]
    reward: float | None
    status: RolloutStatus
    reward_parts: Mapping[str, float] = field(default_factory=dict)
    messages: tuple[Message, ...] = ()
    error: str | None = None
    weight: float = 1.0
    """In the loss: one of weight 2 counts as two of it, one of weight 0 not at all. Its siblings' advantages are the
    same whatever it is."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.weight) and self.weight >= 0):
            raise ValueError(f"weight must be finite and >= 0, got {self.weight}")
        scored = self.status in (RolloutStatus.COMPLETED, RolloutStatus.TRUNCATED)
        if scored and not self.samples:
            raise ValueError(f"a rollout with status {self.status} needs at least one sample")
        if scored and self.reward is None:
            raise ValueError(f"a rollout with status {self.status} needs a reward")
        if not scored and self.reward is not None:
            raise ValueError(f"a rollout with status {self.status} must have reward None, got {self.reward}")
        if self.reward is not None and not math.isfinite(self.reward):
            raise ValueError(f"reward must be finite, got {self.reward}")
        for name, value in self.reward_parts.items():
            if not math.isfinite(value):
                raise ValueError(f"reward_parts[{name!r}] must be finite, got {value}")


@dataclass(frozen=True, slots=True)
class RolloutGroup:
    """The attempts at one task. `task_index` counts the environment's tasks from 0."""

    group_id: str
    environment: str
    task_index: int
    rollouts: tuple[Rollout, ...]

    def __post_init__(self) -> None:
        if not self.group_id:
            raise ValueError("group_id must not be empty")
        if self.task_index < 0:
            raise ValueError(f"task_index must be >= 0, got {self.task_index}")
        if not self.rollouts:
            raise ValueError("rollouts must not be empty")

    @property
    def oldest_policy_version(self) -> int | None:
        """The smallest version any token was sampled under; `None` when nothing was sampled."""
        return min(self.policy_versions, default=None)

    @property
    def newest_policy_version(self) -> int | None:
        """The largest version any token was sampled under; `None` when nothing was sampled."""
        return max(self.policy_versions, default=None)

    @property
    def policy_versions(self) -> set[int]:
        """Every version that a token was sampled under."""
        return {v.policy_version for r in self.rollouts for s in r.samples for v in s.versions}


def _check_finite(name: str, values: tuple[float, ...]) -> None:
    """Nothing takes a sum back from where a NaN or an infinity has put it, and to add up is a tenth of the work."""
    if not math.isfinite(sum(values)):
        for i, value in enumerate(values):
            if not math.isfinite(value):
                raise ValueError(f"{name}[{i}] must be finite, got {value}")


def _check_cover(versions: tuple[VersionSpan, ...], sampled: Sequence[bool]) -> None:
    """Spans cover every sampled position once, in order, and no other position."""
    position = 0
    for span in versions:
        unsampled = sampled[position : span.start]
        inside = sampled[span.start : span.end]
        if span.start < position or span.end > len(sampled) or any(unsampled) or not all(inside):
            raise ValueError(
                f"version span [{span.start}, {span.end}) must follow the last and hold sampled tokens alone"
            )
        position = span.end
    if any(sampled[position:]):
        raise ValueError(f"sampled tokens from {position} on have no version span")
