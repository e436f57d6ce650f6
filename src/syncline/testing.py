"""Fakes of the seams, hand written, for your own tests: an environment or a learner runs on them without a server.

They keep the contracts of `syncline.protocols`, in memory and at once; the contract suites run over them too.
"""

import asyncio
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from syncline.errors import TrajectoryError
from syncline.protocols import Permit
from syncline.types import (
    Completion,
    FinishReason,
    ImageRef,
    Message,
    Rollout,
    RolloutGroup,
    RolloutStatus,
    SamplingParams,
    TrainingSample,
    VersionSpan,
)


def make_group(
    environment: str,
    task_index: int,
    *,
    group_id: str | None = None,
    policy_version: int = 0,
    rewards: Sequence[float | None] = (1.0, 0.0),
) -> RolloutGroup:
    """A small valid group, one rollout a reward, all sampled under `policy_version`; a reward `None` is an error."""
    sample = TrainingSample((5, 6, 7), (False, True, True), (0.0, -0.5, -0.25), (VersionSpan(policy_version, 1, 3),))
    rollouts = tuple(
        Rollout((), None, RolloutStatus.ERROR, error="made to fail")
        if reward is None
        else Rollout((sample,), reward, RolloutStatus.COMPLETED, {"correct": reward})
        for reward in rewards
    )
    return RolloutGroup(group_id or f"{environment}-{task_index}", environment, task_index, rollouts)


@dataclass(slots=True)
class _Held:
    """A group and where it stands: `step` is `None` until a step consumed it."""

    group: RolloutGroup
    permit_id: str
    leased: bool = False
    step: int | None = None


class InMemoryTrajectories:
    """`RolloutSink` and `RolloutSource` in one: a first-in, first-out queue. No back-pressure, expiry or staleness.

    Environments and learner may be on different threads. At most `max_permits` are out or put at once: a worker's
    loop can be run against it until it gets no more.
    """

    def __init__(self, *, max_permits: int = 1_000_000, wait_timeout_seconds: float = 0.0) -> None:
        self._max_permits = max_permits
        self._wait_timeout_seconds = wait_timeout_seconds
        self._changed = threading.Condition()
        self._permits: dict[str, tuple[str, int]] = {}
        self._settled: dict[str, str | None] = {}
        self._held: list[_Held] = []
        self._next_index: dict[str, int] = {}
        self._returned: dict[str, list[int]] = {}
        self.num_granted = 0
        self.given_back: list[tuple[Permit, str]] = []
        self.policy_version = -1

    async def permits(self, environment: str, num_permits: int, *, timeout_seconds: float) -> list[Permit]:
        """Never waits: what is left of `max_permits` now, or nothing."""
        await asyncio.sleep(0)
        with self._changed:
            free = self._max_permits - len(self._permits) - len(self._held)
            return [self._permit(environment) for _ in range(min(num_permits, free))]

    async def put(self, group: RolloutGroup, permit: Permit) -> None:
        await asyncio.sleep(0)
        with self._changed:
            if self._settled.get(permit.permit_id) == group.group_id:
                return
            if self._permits.get(permit.permit_id) != (group.environment, group.task_index):
                raise TrajectoryError(f"permit {permit.permit_id!r} is unknown, used up or for another task")
            del self._permits[permit.permit_id]
            self._settled[permit.permit_id] = group.group_id
            self._held.append(_Held(group, permit.permit_id))
            self._changed.notify_all()

    async def give_back(self, permit: Permit, reason: str) -> None:
        await asyncio.sleep(0)
        with self._changed:
            if permit.permit_id in self._permits:
                environment, index = self._permits.pop(permit.permit_id)
                self._settled[permit.permit_id] = None
                self._returned.setdefault(environment, []).append(index)
                self.given_back.append((permit, reason))
            elif self._settled.get(permit.permit_id, "") is not None:
                raise TrajectoryError(f"permit {permit.permit_id!r} is unknown or used up")

    def start(self, *, policy_version: int, step: int, resumed_version: int | None = None) -> None:
        with self._changed:
            kept = policy_version if resumed_version is None else resumed_version
            self.policy_version = policy_version
            self.commit(step=step)
            for held in self._held:
                held.leased, held.step = False, None
            lost = [held for held in self._held if (held.group.newest_policy_version or 0) > kept]
            for held in lost:
                self._held.remove(held)
                self._returned.setdefault(held.group.environment, []).append(held.group.task_index)
            self._changed.notify_all()

    def next_batch(self, num_groups: int) -> list[RolloutGroup]:
        with self._changed:
            deadline = time.monotonic() + self._wait_timeout_seconds
            while len(ready := [held for held in self._held if not held.leased]) < num_groups:
                if not self._changed.wait(max(0.0, deadline - time.monotonic())):
                    raise TrajectoryError(f"{len(ready)} of {num_groups} groups after {self._wait_timeout_seconds:g} s")
            for held in ready[:num_groups]:
                held.leased = True
            return [held.group for held in ready[:num_groups]]

    def acknowledge(self, groups: Sequence[RolloutGroup], *, step: int, policy_version: int) -> None:
        with self._changed:
            by_group = {held.group.group_id: held for held in self._held if held.leased}
            unknown = [group.group_id for group in groups if group.group_id not in by_group]
            if unknown:
                raise TrajectoryError(f"groups {unknown} are not leased")
            for group in groups:
                by_group[group.group_id].step = step
            self.policy_version = policy_version

    def commit(self, *, step: int) -> None:
        with self._changed:
            self._held = [held for held in self._held if held.step is None or held.step > step]

    def metrics(self) -> dict[str, float]:
        with self._changed:
            return {"queue/length": float(sum(not held.leased for held in self._held))}

    def _permit(self, environment: str) -> Permit:
        returned = self._returned.setdefault(environment, [])
        if returned:
            index = min(returned)
            returned.remove(index)
        else:
            index = self._next_index.get(environment, 0)
            self._next_index[environment] = index + 1
        self.num_granted += 1
        permit = Permit(f"permit-{self.num_granted}", index)
        self._permits[permit.permit_id] = (environment, index)
        return permit


class FakeGenerate:
    """`Generate` from a function: `respond(prompt_token_ids, sampling, i)` is the i-th completion of the call."""

    def __init__(self, respond: Callable[[Sequence[int], SamplingParams, int], Completion]) -> None:
        self._respond = respond
        self.calls: list[tuple[tuple[int, ...], SamplingParams, int]] = []
        """`(prompt_token_ids, sampling, num_completions)` of every call, in order."""
        self.images: list[tuple[ImageRef, ...]] = []
        """Of every call, in order."""

    async def generate(
        self,
        prompt_token_ids: Sequence[int],
        sampling: SamplingParams,
        *,
        num_completions: int = 1,
        images: Sequence[ImageRef] = (),
    ) -> list[Completion]:
        self.images.append(tuple(images))
        self.calls.append((tuple(prompt_token_ids), sampling, num_completions))
        await asyncio.sleep(0)
        return [self._respond(prompt_token_ids, sampling, i) for i in range(num_completions)]


class ScriptedPolicy:
    """`Policy` from a function: `respond(seen)` is what the model says after all it sees. A token is a character."""

    def __init__(self, respond: Callable[[str], str]) -> None:
        self._respond = respond

    def encode(self, messages: Sequence[Message], *, after: Sequence[int] = ()) -> tuple[int, ...]:
        del after  # the messages, one after the other, are always the tokens so far and what is new
        return tuple(ord(character) for message in messages for character in message.content)

    def decode(self, token_ids: Sequence[int]) -> str:
        return "".join(map(chr, token_ids))

    async def sample(
        self, prompt_token_ids: Sequence[int], *, num_completions: int, images: Sequence[ImageRef] = ()
    ) -> list[Completion]:
        del images  # it sees texts alone
        await asyncio.sleep(0)
        said = [tuple(map(ord, self._respond(self.decode(prompt_token_ids)))) for _ in range(num_completions)]
        spans = [(VersionSpan(0, 0, len(ids)),) if ids else () for ids in said]
        return [Completion(ids, (-1.0,) * len(ids), v, FinishReason.STOP) for ids, v in zip(said, spans, strict=True)]


class ListMetricSink:
    """`MetricSink` that keeps what it is given."""

    def __init__(self) -> None:
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.rollouts: list[tuple[int, list[RolloutGroup], dict[str, list[float]]]] = []
        self.closed = False

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.logged.append((step, dict(metrics)))

    def log_rollouts(
        self, step: int, groups: Iterable[RolloutGroup], advantages: Mapping[str, Sequence[float]]
    ) -> None:
        self.rollouts.append((step, list(groups), {group_id: list(values) for group_id, values in advantages.items()}))

    def close(self) -> None:
        self.closed = True
