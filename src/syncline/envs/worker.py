"""The environment process's loop: permits in, groups out.

The sink hands out permits (its back-pressure: without one nothing is sampled); `run` waits for them, at most
`POLL_SECONDS` at a time. Each permit becomes an `_attempt`: it samples one group, at most `group_timeout_seconds` long,
then puts the group or gives the permit back with the reason, which frees the task for another attempt. An engine that
is paused or reloading only makes the policy's `sample` take longer. `stop` (set on SIGTERM) ends the polling and every
attempt; `run` returns once each has given its permit back.
"""

import asyncio
import logging
import signal
from dataclasses import dataclass, field

from syncline.envs.scoring import in_words
from syncline.errors import EngineGone, EngineTimeout, SynclineError
from syncline.protocols import Environment, Permit, Policy, RolloutSink
from syncline.types import RolloutGroup, RolloutStatus

POLL_SECONDS = 2.0
REPORT_SECONDS = 60.0
STOP_SECONDS = 10.0
"""How long attempts have to give their permits back; what is left then expires on the sink's clock."""
UNUSED = ""
"""The reason that is none: nothing speaks against the task."""
FAILED_ROUNDS = 2
"""Gives up when this many times `concurrency` groups failed in a row: by then the fault is not a passing one."""

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Counts:
    """Since the last report."""

    groups: int = 0
    given_back: int = 0
    rewards: list[float] = field(default_factory=list)


class EnvironmentWorker:
    """Keeps up to `concurrency` groups of one environment in flight."""

    def __init__(
        self,
        environment: Environment,
        policy: Policy,
        *,
        sink: RolloutSink,
        name: str,
        rollouts_per_group: int,
        concurrency: int,
        group_timeout_seconds: float,
    ) -> None:
        self._environment = environment
        self._policy = policy
        self._sink = sink
        self._name = name
        self._rollouts_per_group = rollouts_per_group
        self._concurrency = concurrency
        self._group_timeout_seconds = group_timeout_seconds
        self._counts = _Counts()
        self._failed_in_a_row = 0

    async def run_until_signal(self) -> None:
        """`run`, ended by SIGTERM or SIGINT."""
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        await self.run(stop)

    async def run(self, stop: asyncio.Event) -> None:
        """Until `stop`, which it sets itself when it raises.

        Raises the sink's `TrajectoryError`, and `SynclineError` when group after group fails.
        """
        loop = asyncio.get_running_loop()
        stopping = loop.create_task(stop.wait())
        in_flight: set[asyncio.Task[None]] = set()
        report_at = loop.time() + REPORT_SECONDS
        try:
            while not stop.is_set():
                for permit in await self._free_permits(in_flight, stopping):
                    in_flight.add(loop.create_task(self._attempt(permit, stopping)))
                for attempt in [a for a in in_flight if a.done()]:
                    in_flight.remove(attempt)
                    attempt.result()
                if loop.time() >= report_at:
                    self._report(len(in_flight))
                    report_at = loop.time() + REPORT_SECONDS
        finally:
            stop.set()
            await _settle(in_flight)
            self._report(0)

    async def _free_permits(self, in_flight: set[asyncio.Task[None]], stopping: asyncio.Task[bool]) -> list[Permit]:
        free = self._concurrency - len(in_flight)
        if free:
            return await self._asked(free, stopping)
        await asyncio.wait({*in_flight, stopping}, timeout=POLL_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        return []

    async def _asked(self, free: int, stopping: asyncio.Task[bool]) -> list[Permit]:
        """What the sink gives. One that is away may be tried for long; a worker that is stopped waits only so long."""
        asking = asyncio.create_task(self._sink.permits(self._name, free, timeout_seconds=POLL_SECONDS))
        try:
            await asyncio.wait({asking, stopping}, return_when=asyncio.FIRST_COMPLETED)
            await asyncio.wait({asking}, timeout=STOP_SECONDS)
            return asking.result() if asking.done() else []
        finally:
            asking.cancel()

    async def _attempt(self, permit: Permit, stopping: asyncio.Task[bool]) -> None:
        """One permit from start to finish. What escapes from the environment is read off its task, as data."""
        sampling = asyncio.create_task(self._group(permit))
        wait_seconds = self._group_timeout_seconds
        await asyncio.wait({sampling, stopping}, timeout=wait_seconds, return_when=asyncio.FIRST_COMPLETED)
        if not sampling.done():
            sampling.cancel()
            if stopping.done():
                await self._give_back(permit, UNUSED)
            else:
                await self._failed(permit, f"the group was not finished in {wait_seconds:g} s")
        elif sampling.cancelled():  # by the environment: the worker's own cancellation ends the wait above
            await self._failed(permit, "CancelledError: the environment cancelled its own task")
        elif error := sampling.exception():
            log.debug("task %d of %s", permit.task_index, self._name, exc_info=error)
            its_own = not isinstance(error, EngineGone | EngineTimeout)
            await self._failed(permit, in_words(error), its_own=its_own)
        else:
            await self._put(sampling.result(), permit)

    async def _group(self, permit: Permit) -> RolloutGroup:
        task = self._environment.task(permit.task_index)
        rollouts = await self._environment.rollouts(task, self._rollouts_per_group, self._policy)
        if len(rollouts) != self._rollouts_per_group:
            raise ValueError(f"rollouts() made {len(rollouts)} rollouts, asked for {self._rollouts_per_group}")
        group_id = f"{self._name}-{permit.task_index}-{permit.permit_id}"
        return RolloutGroup(group_id, self._name, permit.task_index, tuple(rollouts))

    async def _put(self, group: RolloutGroup, permit: Permit) -> None:
        """A group the engine aborted as a whole is sampled again; one with only errors is kept, for people to see."""
        rewards = [r.reward for r in group.rollouts if r.reward is not None]
        if all(r.status is RolloutStatus.ABORTED for r in group.rollouts):
            return await self._give_back(permit, UNUSED)
        await self._sink.put(group, permit)
        self._counts.groups += 1
        self._counts.rewards.extend(rewards)
        if rewards:
            self._failed_in_a_row = 0
        else:
            self._count_failure(next((r.error for r in group.rollouts if r.error), "no rollout has a reward"))

    async def _failed(self, permit: Permit, reason: str, *, its_own: bool = True) -> None:
        """A fault that is not the task's own, but the engine's, does not count against the task."""
        log.warning("%s: task %d failed: %s", self._name, permit.task_index, reason)
        await self._give_back(permit, reason if its_own else UNUSED)
        self._count_failure(reason)

    async def _give_back(self, permit: Permit, reason: str) -> None:
        self._counts.given_back += 1
        await self._sink.give_back(permit, reason)

    def _count_failure(self, reason: str | None) -> None:
        self._failed_in_a_row += 1
        if self._failed_in_a_row >= FAILED_ROUNDS * self._concurrency:
            raise SynclineError(
                f"environment {self._name!r}: {self._failed_in_a_row} groups failed in a row, the last one: {reason}"
            )

    def _report(self, num_in_flight: int) -> None:
        counts, self._counts = self._counts, _Counts()
        reward = f"{sum(counts.rewards) / len(counts.rewards):.3f}" if counts.rewards else "-"
        log.info(
            "%s: %d groups put, %d given back, %d in flight, mean reward %s",
            self._name, counts.groups, counts.given_back, num_in_flight, reward,
        )  # fmt: skip


async def _settle(in_flight: set[asyncio.Task[None]]) -> None:
    if not in_flight:
        return
    done, late = await asyncio.wait(in_flight, timeout=STOP_SECONDS)
    for attempt in late:
        attempt.cancel()
    faults = [error for attempt in done if (error := attempt.exception())]
    if late or faults:
        log.warning(
            "%d permits were not given back; they will expire: %s", len(late) + len(faults), faults or "too late"
        )
