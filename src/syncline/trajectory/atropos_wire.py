"""The messages of the Atropos wire, and what one of its groups is as a `RolloutGroup` (and back).

The fields are `atroposlib` 0.4.0's, which ignores unknown keys and reads numbers in quotes, so that is done here too.
What it does not do is check: here every per-token list is as long as its sequence, every number is finite, and a mask
is -100 or the token itself. The wire has no policy versions, and logprobs only where an environment sends them; a
sample says what it lacks (`syncline.types.Lack`).
"""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from syncline.types import Lack, Message, Rollout, RolloutGroup, RolloutStatus, TrainingSample

UNTRAINED = -100
"""In a mask: this token is not trained on."""
UNSAMPLED_LOGPROB = 1.0
"""In `inference_logprobs`: this token was not sampled. No log-probability is positive."""
MIN_WEIGHT = 0.01
MAX_SIZE = 2**31 - 1

Size = Annotated[int, Field(ge=1, le=MAX_SIZE)]
Step = Annotated[int, Field(ge=0, le=MAX_SIZE)]
Text = Annotated[str, Field(max_length=4096)]
EnvId = Annotated[int, Field(ge=-MAX_SIZE, le=MAX_SIZE)]
Tokens = list[Annotated[int, Field(ge=0, le=MAX_SIZE)]]
Floats = list[float]
PerToken = list[Floats] | None


class AtroposMessage(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)


class Registration(AtroposMessage):
    """What a trainer says of itself. `batch_size` counts sequences."""

    wandb_group: Text
    wandb_project: Text
    batch_size: Size
    max_token_len: Annotated[int, Field(ge=-1, le=MAX_SIZE)]
    """At most 0: sequences of any length."""
    checkpoint_dir: Text
    save_checkpoint_interval: Annotated[int, Field(ge=-1, le=MAX_SIZE)]
    starting_step: Step
    num_steps: Annotated[int, Field(ge=-1, le=MAX_SIZE)]


class RegisterEnv(AtroposMessage):
    max_token_length: Size
    desired_name: Text | None
    """`BaseEnv` sends null where its `wandb_name` is not set."""
    weight: Annotated[float, Field(ge=-1e6, le=1e6)]
    group_size: Size
    min_batch_allocation: Annotated[float, Field(ge=0, le=1)] | None = None


class EnvIdentifier(AtroposMessage):
    env_id: EnvId


class RegisteredEnv(RegisterEnv):
    model_config = ConfigDict(frozen=False)

    name: str
    """Of its line in the queue, and its run in wandb."""
    connected: bool = True

    @property
    def share(self) -> float:
        """Its weight among those that take turns: above 0, so that no environment starves."""
        return max(MIN_WEIGHT, self.weight)


class AtroposState(BaseModel):
    """What the server remembers of this wire, beside the queue."""

    registration: Registration | None = None
    started: bool = False
    """The trainer has asked for a batch: from then on environments may register."""
    envs: list[RegisteredEnv] = []
    passed_over: int = 0
    """Batches in a row that went without the oldest group, because it did not fit."""

    def weight_of(self, name: str) -> float:
        return next((env.share for env in self.envs if env.name == name), 1.0)


class ScoredData(AtroposMessage):
    """One group: the sequences of one task."""

    tokens: Annotated[list[Annotated[Tokens, Field(min_length=1)]], Field(min_length=1, max_length=65536)]
    masks: list[list[Annotated[int, Field(ge=UNTRAINED, le=MAX_SIZE)]]]
    scores: Floats
    advantages: PerToken = None
    ref_logprobs: PerToken = None
    messages: list[list[dict[str, Any]]] | None = None
    generation_params: dict[str, Any] | None = None
    inference_logprobs: PerToken = None
    overrides: list[dict[str, Any]] | None = None
    group_overrides: dict[str, Any] | None = None
    images: Any | None = None
    env_id: EnvId | None = None
    distill_token_ids: list[list[Tokens]] | None = None
    distill_logprobs: list[list[Floats]] | None = None

    @field_validator("messages")
    @classmethod
    def _roles(cls, value: list[list[dict[str, Any]]] | None) -> list[list[dict[str, Any]]] | None:
        for message in (message for messages in value or [] for message in messages):
            if "role" not in message or "content" not in message:
                raise ValueError("every message must have 'role' and 'content'")
        return value

    @model_validator(mode="after")
    def _aligned(self) -> "ScoredData":
        for name in ("masks", "scores", "messages", "overrides"):
            self._count(name)
        for name in ("masks", "advantages", "ref_logprobs", "inference_logprobs", *_DISTILLED):
            self._count(name)
            for i, row in enumerate(getattr(self, name) or []):
                if len(row) != len(self.tokens[i]):
                    raise ValueError(f"{name}[{i}] has {len(row)} entries, but tokens[{i}] has {len(self.tokens[i])}")
        for i, (tokens, mask) in enumerate(zip(self.tokens, self.masks, strict=True)):
            for j, (token, label) in enumerate(zip(tokens, mask, strict=True)):
                if label not in (UNTRAINED, token):
                    raise ValueError(f"masks[{i}][{j}] must be {UNTRAINED} or tokens[{i}][{j}] = {token}, got {label}")
        return self

    def _count(self, name: str) -> None:
        values = getattr(self, name)
        if values is not None and len(values) != len(self.tokens):
            raise ValueError(f"{name} has {len(values)} entries, but tokens has {len(self.tokens)}")


_DISTILLED = ("distill_token_ids", "distill_logprobs")


def to_group(data: ScoredData, *, group_id: str, environment: str, task_index: int) -> RolloutGroup:
    """As the learner trains on it. `advantages`, `ref_logprobs`, `images` and the teacher's fields are left out: this
    learner computes its own."""
    return RolloutGroup(
        group_id=group_id,
        environment=environment,
        task_index=task_index,
        rollouts=tuple(_rollout(data, i) for i in range(len(data.tokens))),
    )


def _rollout(data: ScoredData, i: int) -> Rollout:
    messages = data.messages[i] if data.messages else []
    return Rollout(
        samples=(_sample(data, i),),
        reward=data.scores[i],
        status=RolloutStatus.COMPLETED,
        messages=tuple(Message(str(message["role"]), _text(message["content"])) for message in messages),
    )


def _sample(data: ScoredData, i: int) -> TrainingSample:
    """The first token is never trained on, as the shift by one of a trainer of theirs never does; a sequence whose
    advantage is to be zero counts for its group's mean alone."""
    tokens, silent = data.tokens[i], bool(data.overrides and data.overrides[i].get("set_advantage_to_zero"))
    mask = [j > 0 and label != UNTRAINED and not silent for j, label in enumerate(data.masks[i])]
    logprobs = data.inference_logprobs[i] if data.inference_logprobs else None
    lacks = [Lack.VERSIONS]
    if logprobs is None or any(logprob > 0 for logprob, sampled in zip(logprobs, mask, strict=True) if sampled):
        logprobs = [0.0] * len(tokens)
        lacks.append(Lack.LOGPROBS)
    return TrainingSample(
        token_ids=tuple(tokens),
        loss_mask=tuple(mask),
        logprobs=tuple(logprob if sampled else 0.0 for logprob, sampled in zip(logprobs, mask, strict=True)),
        versions=(),
        lacks=tuple(lacks),
    )


def _text(content: Any) -> str:
    return content if isinstance(content, str) else str(content)


def from_group(group: RolloutGroup) -> ScoredData:
    """As a trainer of theirs reads it: a sequence for every sample of a scored rollout. Raises `ValueError` when there
    is none."""
    scored = [
        (rollout, sample) for rollout in group.rollouts if rollout.reward is not None for sample in rollout.samples
    ]
    return ScoredData(
        tokens=[list(sample.token_ids) for _, sample in scored],
        masks=[
            [token if sampled else UNTRAINED for token, sampled in zip(sample.token_ids, sample.loss_mask, strict=True)]
            for _, sample in scored
        ],
        scores=[rollout.reward for rollout, _ in scored if rollout.reward is not None],
        inference_logprobs=[
            [
                logprob if sampled else UNSAMPLED_LOGPROB
                for logprob, sampled in zip(sample.logprobs, sample.loss_mask, strict=True)
            ]
            for _, sample in scored
        ],
        messages=[
            [{"role": message.role, "content": message.content} for message in rollout.messages]
            for rollout, _ in scored
        ],
    )
