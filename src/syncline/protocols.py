"""The seams: one `Protocol` for each thing that varies. Everything else is one implementation.

Who calls whom: environments hold a `Policy` (sampling and text) and a `RolloutSink`; the learner holds a
`RolloutSource`, a `WeightBridge` and a `MetricSink`; a bridge holds an `EngineControl`. They never see each other.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

from syncline.types import Completion, ImageRef, Message, Rollout, RolloutGroup, SamplingParams


class Generate(Protocol):
    """Tokens in, tokens out."""

    async def generate(
        self,
        prompt_token_ids: Sequence[int],
        sampling: SamplingParams,
        *,
        num_completions: int = 1,
        images: Sequence[ImageRef] = (),
    ) -> list[Completion]:
        """Samples `num_completions` sequences of one prompt, in which each of `images` has the one placeholder that the
        chat template gives it; the completions then say how the engine read it. Raises `EngineError`, `EngineTimeout`.
        """
        ...


class Policy(Protocol):
    """What an environment sees of the model: messages in, rollout-ready completions out."""

    def encode(self, messages: Sequence[Message], *, after: Sequence[int] = ()) -> tuple[int, ...]:
        """Prompt tokens of a conversation, generation prompt included.

        `after` are the tokens of the same conversation up to now, as they were given and sampled. The prompt begins
        with exactly these wherever they read as the messages are rendered; where they do not (a template that leaves
        earlier thoughts out), it is rendered anew.
        """
        ...

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of sampled tokens, special tokens left out."""
        ...

    async def sample(
        self, prompt_token_ids: Sequence[int], *, num_completions: int, images: Sequence[ImageRef] = ()
    ) -> list[Completion]:
        """Samples with the run's `SamplingParams`. `images` are those of the messages that were encoded, in order."""
        ...


class Environment(Protocol):
    """A task family: hands out tasks by index, attempts and scores them.

    `task(i)` is a pure function of the environment's own configuration and `i`, so that a lost task can be
    handed out again. `score` never raises for a wrong answer; whatever escapes becomes `RolloutStatus.ERROR`.
    One whose training tasks come again after a pass may have `num_train_tasks`: the metric `epoch` counts passes.
    """

    name: str

    def task(self, index: int, *, split: str = "train") -> Any:
        """The task with this index; `split` is `"train"` (endless) or `"heldout"` (disjoint from train)."""
        ...

    async def rollouts(self, task: Any, num_rollouts: int, policy: Policy) -> list[Rollout]:
        """Attempts the task `num_rollouts` times and scores each attempt."""
        ...


@dataclass(frozen=True, slots=True)
class Permit:
    """The trajectory server's leave to sample one group: the back-pressure. Expires on the server's clock."""

    permit_id: str
    task_index: int


class RolloutSink(Protocol):
    """Where an environment takes permits and puts finished groups."""

    async def permits(self, environment: str, num_permits: int, *, timeout_seconds: float) -> list[Permit]:
        """Waits for up to `num_permits` permits; an empty list after the timeout. Raises `TrajectoryError`."""
        ...

    async def put(self, group: RolloutGroup, permit: Permit) -> None:
        """Returns once the group is stored durably. Putting the same permit twice stores one group, and putting one
        that has expired none: its task was handed out again."""
        ...

    async def give_back(self, permit: Permit, reason: str) -> None:
        """No group will come; the task is handed out again. An empty `reason`: nothing went wrong. Any other counts
        against the task, which is abandoned after a few."""
        ...


class RolloutSource(Protocol):
    """Where the learner takes whole groups. Leased groups stay the server's until a checkpoint holds their effect."""

    def start(self, *, policy_version: int, step: int, resumed_version: int | None = None) -> None:
        """Declares the policy now served and the step the learner (re)starts from.

        Groups consumed by steps after `step` (lost with the process that trained on them) are handed out again. What
        was sampled under versions above `resumed_version` is dropped: a life that is lost published them.
        """
        ...

    def next_batch(self, num_groups: int) -> list[RolloutGroup]:
        """Waits for `num_groups` groups, oldest first, and leases them. Raises `TrajectoryError` at the deadline."""
        ...

    def acknowledge(self, groups: Sequence[RolloutGroup], *, step: int, policy_version: int) -> None:
        """These groups were trained on in `step`; `policy_version` is served from now on."""
        ...

    def commit(self, *, step: int) -> None:
        """A checkpoint holds `step`: groups it or an earlier step consumed will never be handed out again."""
        ...

    def metrics(self) -> Mapping[str, float]:
        """The queue's state now, for the step's metrics: `queue/length`, counters under `queue/`."""
        ...


@dataclass(frozen=True, slots=True)
class Receipt:
    """What one party holds: the policy version and the digest of the weights."""

    policy_version: int
    digest: str


@dataclass(frozen=True, slots=True)
class SyncReport:
    """One publish: the proved receipt, what it moved and how long each part took."""

    receipt: Receipt
    num_bytes: int
    seconds: float
    pause_seconds: float
    parts_seconds: Mapping[str, float] = field(default_factory=dict)
    changed_fraction: float | None = None
    """Of the weights' 16-bit words, those the engines were sent anew; `None`: nobody compared."""
    num_engines: int | None = None
    """Engines that proved this version; `None` where another rank counts them."""
    num_lost: int = 0
    """Engines that the run goes on without until they come back."""


@dataclass(frozen=True, slots=True)
class Membership:
    """An engine in a learner's process group: its number of workers, and the group's name; empty: in none."""

    world_size: int
    generation: str


@dataclass(frozen=True, slots=True)
class Paused:
    """An engine that does not sample: what it holds, and the learner's process group it is in; empty: none."""

    receipt: Receipt
    generation: str = ""


@dataclass(frozen=True, slots=True)
class Received:
    """What an engine holds after a broadcast, and how long it took to measure, name and resume it."""

    receipt: Receipt
    prove_seconds: float


class EngineControl(Protocol):
    """What a bridge needs of an engine. Every call has a deadline and raises `EngineError` or `EngineTimeout`."""

    name: str

    def wait_until_ready(self, *, timeout_seconds: float) -> None: ...

    def pause(self, *, mode: str, timeout_seconds: float, reuse_kv: bool = False) -> Paused:
        """Stops sampling at a token boundary. `mode`: running requests end first (`"drain"`), freeze (`"keep"`: they
        go on under the next version) or end as aborted (`"abort"`). Frozen ones are computed again from their first
        token, or with `reuse_kv` go on from the keys and values of the weights they began with."""
        ...

    def resume(self, expected: Receipt) -> None:
        """Raises `EngineError`, and samples nothing, unless the engine holds exactly what is expected."""
        ...

    def receipt(self) -> Receipt:
        """Version and digest of the weights the engine would sample from now. Version -1: never published."""
        ...

    def parameters(self) -> Mapping[str, str]:
        """Checkpoint name → dtype, shape and digest of each parameter, to name what differs."""
        ...

    def export(self) -> Sequence[Mapping[str, Any]]:
        """Where the parameters lie in memory another process of this host can open (`bridges.handles`), under their
        checkpoint names: one export a tensor-parallel rank, in rank order. Needs an engine started to share."""
        ...

    def reload(self, path: str, *, expected: Receipt, timeout_seconds: float) -> Receipt:
        """Loads a safetensors checkpoint in place (paused engines only) and answers with what it then holds: what is
        expected, or weights that have no version and cannot be resumed."""
        ...

    def restart(self, path: str, *, policy_version: int, timeout_seconds: float) -> Receipt:
        """Replaces the engine process by one that loads `path`; returns when the new one is ready, paused."""
        ...

    def adapters(self) -> Mapping[str, Any]:
        """What adapters it can hold: `dtype`, `max_rank`, `modules` (name → inputs, outputs), and the `whereabouts`
        (`bridges.carriers`) of each rank. Raises `EngineError` when it was started without."""
        ...

    def stage(self, adapter: Mapping[str, Any], *, policy_version: int, timeout_seconds: float) -> Mapping[str, str]:
        """Loads an adapter beside the one that is sampled from; name → dtype, shape and digest of what it then holds.
        `adapter`: its `layout`, an `AdapterLayout.text`, and the `source` to read it from (`bridges.carriers`)."""
        ...

    def switch(self, receipt: Receipt, *, resume: bool = False) -> Receipt:
        """New requests are sampled from the adapter that gives this receipt's digest, as its version; running ones
        end under the adapter they began with. With `resume` a paused engine goes on. Raises `EngineError` when it
        holds no such adapter."""
        ...

    def adopt(self, expected: Receipt, *, resume: bool = False) -> Receipt:
        """Measures the weights already held and names them, nothing is loaded; with `resume` samples from them at once.
        Weights other than expected get no version and are not resumed."""
        ...

    def membership(self) -> Membership: ...

    def join_broadcast(self, invitation: Mapping[str, Any], *, first_rank: int, timeout_seconds: float) -> str:
        """Every worker becomes a rank of the learner's group (`bridges.invitation`). Returns the plan's digest."""
        ...

    def receive_broadcast(
        self, expected: Receipt, *, generation: str, timeout_seconds: float, resume: bool = False
    ) -> Received:
        """Takes a version from the learner's group (paused engines only); `resume` as for `adopt`. Between the start of
        it and the proof, after a fault, and when it is not what was expected, the weights have no version."""
        ...


class WeightBridge(Protocol):
    """Keeps the engine on the learner's policy. `model` is a `torch.nn.Module` with Hugging Face parameter names.

    Contract: after `publish(v)` returns, the engine samples from `v` and holds the digest the learner computed;
    versions only grow; when it raises, the engine is paused, so nothing is sampled from an unproved state.
    """

    def attach(self, model: Any) -> None:
        """Once, before the optimizer exists. Refuses a model the engine does not serve, naming the parameter."""
        ...

    def updating(self) -> AbstractContextManager[None]:
        """Surrounds whatever may change what the engine reads. Leaves the engine paused if the body raises."""
        ...

    def publish(self, model: Any, *, policy_version: int) -> SyncReport:
        """Makes the engine serve `model` as `policy_version`, proved. Raises `SyncError`, `EngineError`."""
        ...

    def close(self) -> None: ...


class MetricSink(Protocol):
    """Where a step's metrics go. Keys follow TRL's names where TRL has one, `room/what/stat` elsewhere."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def log_rollouts(
        self, step: int, groups: Iterable[RolloutGroup], advantages: Mapping[str, Sequence[float]]
    ) -> None:
        """Keeps a few rollouts for people to read; `advantages` by group id, one a rollout."""
        ...

    def close(self) -> None: ...
