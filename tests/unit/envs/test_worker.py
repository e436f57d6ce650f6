"""The worker's loop against the in-memory sink: what is put, what goes back, and how it ends."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from character_tokenizer import CharacterTokenizer, completion

from syncline.envs import worker as module
from syncline.envs.rendering import ChatPolicy
from syncline.envs.tasks.arithmetic import Arithmetic
from syncline.envs.worker import FAILED_ROUNDS, UNUSED, EnvironmentWorker
from syncline.errors import EngineError, EngineGone, EngineTimeout, SynclineError, TrajectoryError
from syncline.protocols import Permit
from syncline.testing import FakeGenerate, InMemoryTrajectories
from syncline.types import Completion, FinishReason, Rollout, RolloutGroup, RolloutStatus, SamplingParams

SAMPLING = SamplingParams(max_tokens=8)


class Scripted:
    """An environment whose attempt at task `i` is `attempt(i)`."""

    name = "scripted"

    def __init__(self, attempt: Callable[[int], Awaitable[Any]]) -> None:
        self._attempt = attempt

    def task(self, index: int, *, split: str = "train") -> int:
        return index

    async def rollouts(self, task: int, num_rollouts: int, policy: object) -> list[Rollout]:
        await self._attempt(task)
        sample = await policy.sample((61,), num_completions=num_rollouts)  # type: ignore[attr-defined]
        return [Rollout((), None, RolloutStatus.ERROR, error="unscored") for _ in sample]


def chat(respond: Callable[..., Completion] = lambda prompt, sampling, i: completion("7")) -> ChatPolicy:
    return ChatPolicy(CharacterTokenizer(), FakeGenerate(respond), SAMPLING, max_length=64)


def worker(environment: Any, sink: Any, policy: ChatPolicy | None = None, **options: Any) -> EnvironmentWorker:
    settings = {"name": "e", "rollouts_per_group": 2, "concurrency": 4, "group_timeout_seconds": 30.0, **options}
    return EnvironmentWorker(environment, policy or chat(), sink=sink, **settings)


async def run_until(worker: EnvironmentWorker, reached: Callable[[], bool]) -> None:
    """Runs the worker, stops it once `reached()`, and gives it 20 s for both."""
    stop = asyncio.Event()
    async with asyncio.timeout(20):
        running = asyncio.create_task(worker.run(stop))
        while not reached() and not running.done():
            await asyncio.sleep(0)
        stop.set()
        await running


class Watched(InMemoryTrajectories):
    """Keeps what was put, in order, and the most permits that were out at once."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.groups: list[RolloutGroup] = []
        self.most_out = 0

    async def permits(self, environment: str, num_permits: int, *, timeout_seconds: float) -> list[Permit]:
        granted = await super().permits(environment, num_permits, timeout_seconds=timeout_seconds)
        self.most_out = max(self.most_out, self.num_granted - len(self.groups) - len(self.given_back))
        return granted

    async def put(self, group: RolloutGroup, permit: Permit) -> None:
        await super().put(group, permit)
        self.groups.append(group)


def test_every_permit_becomes_the_group_of_its_task():
    sink, arithmetic = Watched(max_permits=10), Arithmetic(seed=3)
    asyncio.run(run_until(worker(arithmetic, sink), lambda: len(sink.groups) == 10))
    assert sorted(group.task_index for group in sink.groups) == list(range(10))
    assert {(group.environment, len(group.rollouts)) for group in sink.groups} == {("e", 2)}
    assert len({group.group_id for group in sink.groups}) == 10
    asked = {group.task_index: group.rollouts[0].messages[0].content for group in sink.groups}
    assert asked[7] == f"{arithmetic.task(7).expression}="
    assert sink.most_out == 4
    assert sink.given_back == []


def test_failed_group_goes_back_with_the_reason_and_is_attempted_again():
    failures = [EngineError("engine broke off"), KeyError("x")]

    def respond(*_: object) -> Completion:
        if failures:
            raise failures.pop(0)
        return completion("7")

    sink = Watched(max_permits=6)
    asyncio.run(run_until(worker(Arithmetic(), sink, chat(respond)), lambda: len(sink.groups) == 6))
    assert sorted(reason for _, reason in sink.given_back) == ["EngineError: engine broke off", "KeyError: 'x'"]
    assert sorted(group.task_index for group in sink.groups) == list(range(6))


def test_a_reason_with_half_a_character_is_told_not_the_workers_end():
    async def attempt(task: int) -> None:
        if not sink.given_back:
            raise ValueError("cannot read \ud83d")

    sink = Watched(max_permits=1)
    asyncio.run(run_until(worker(Scripted(attempt), sink), lambda: len(sink.groups) == 1))
    assert [reason for _, reason in sink.given_back] == [r"ValueError: cannot read \ud83d"]


@pytest.mark.parametrize("fault", [EngineGone("it broke off"), EngineTimeout("no engine took the request")])
def test_an_engines_fault_is_none_of_its_tasks_but_ends_a_worker_that_meets_nothing_else(fault: EngineError):
    failures: list[EngineError] = [fault] * 2

    def respond(*_: object) -> Completion:
        if failures:
            raise failures.pop()
        return completion("7")

    sink = Watched(max_permits=6)
    asyncio.run(run_until(worker(Arithmetic(), sink, chat(respond)), lambda: len(sink.groups) == 6))
    assert [reason for _, reason in sink.given_back] == [UNUSED] * 2
    failures += [fault] * 20
    with pytest.raises(SynclineError, match=f"8 groups failed in a row, the last one: .*{fault}"):
        asyncio.run(run_until(worker(Arithmetic(), Watched(), chat(respond)), lambda: False))


def test_group_past_its_time_goes_back():
    async def late_once(index: int) -> None:
        if index == 1 and not seen:
            seen.append(index)
            await asyncio.Event().wait()

    seen: list[int] = []
    sink = Watched(max_permits=3)
    late = worker(Scripted(late_once), sink, concurrency=8, group_timeout_seconds=0.05)
    asyncio.run(run_until(late, lambda: len(sink.groups) == 3))
    assert [(permit.task_index, reason) for permit, reason in sink.given_back] == [
        (1, "the group was not finished in 0.05 s")
    ]
    assert sorted(group.task_index for group in sink.groups) == [0, 1, 2]


def test_aborted_group_is_sampled_again_and_is_no_failure():
    aborts = [FinishReason.ABORT] * 40

    def respond(*_: object) -> Completion:
        return completion("1", finish_reason=aborts.pop() if aborts else FinishReason.STOP)

    sink = Watched(max_permits=4)
    asyncio.run(run_until(worker(Arithmetic(), sink, chat(respond)), lambda: len(sink.groups) == 4))
    assert [reason for _, reason in sink.given_back] == [UNUSED] * 20


def test_an_environment_that_cancels_itself_fails_that_task_alone():
    async def cancelled_once(index: int) -> None:
        if index == 1 and not seen:
            seen.append(index)
            inner = asyncio.create_task(asyncio.Event().wait())
            inner.cancel()
            await inner

    seen: list[int] = []
    sink = Watched(max_permits=3)
    asyncio.run(run_until(worker(Scripted(cancelled_once), sink), lambda: len(sink.groups) == 3))
    assert [(permit.task_index, reason) for permit, reason in sink.given_back] == [
        (1, "CancelledError: the environment cancelled its own task")
    ]


def test_a_worker_that_is_cancelled_ends():
    async def forever(index: int) -> None:
        begun.append(index)
        await asyncio.Event().wait()

    async def scenario() -> None:
        running = asyncio.create_task(worker(Scripted(forever), sink).run(asyncio.Event()))
        while len(begun) < 4:
            await asyncio.sleep(0)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(running, 20)

    begun: list[int] = []
    sink = Watched(max_permits=4)
    asyncio.run(scenario())
    assert [reason for _, reason in sink.given_back] == [UNUSED] * 4


def test_stop_gives_back_what_is_in_flight():
    async def forever(index: int) -> None:
        begun.append(index)
        await asyncio.Event().wait()

    begun: list[int] = []
    sink = Watched(max_permits=9)
    asyncio.run(run_until(worker(Scripted(forever), sink), lambda: len(begun) == 4))
    assert sorted(permit.task_index for permit, _ in sink.given_back) == [0, 1, 2, 3]
    assert {reason for _, reason in sink.given_back} == {UNUSED}
    assert sink.groups == []


@pytest.mark.parametrize("broken", [True, False])
def test_group_after_group_failing_ends_the_worker_with_the_last_reason(broken: bool):
    """Whether nothing can be sampled or nothing can be scored; errors that were put are kept for people to see."""

    async def attempt(index: int) -> None:
        if broken:
            raise ValueError(f"task {index} is broken")

    sink = Watched()
    with pytest.raises(SynclineError, match=r"'e': 8 groups failed in a row, the last one: .*(is broken|unscored)"):
        asyncio.run(run_until(worker(Scripted(attempt), sink), lambda: False))
    assert FAILED_ROUNDS == 2
    assert (len(sink.groups) == 0) == broken


def test_sink_that_fails_ends_the_worker_and_permits_in_flight_go_back():
    class Full(Watched):
        async def put(self, group: RolloutGroup, permit: Permit) -> None:
            raise TrajectoryError("disk full")

    async def only_the_first(index: int) -> None:
        if index:
            await asyncio.Event().wait()

    sink = Full(max_permits=4)
    with pytest.raises(TrajectoryError, match="disk full"):
        asyncio.run(run_until(worker(Scripted(only_the_first), sink), lambda: False))
    assert sorted(permit.task_index for permit, _ in sink.given_back) == [1, 2, 3]


def test_environment_that_makes_too_few_rollouts_is_told_so():
    class Short(Arithmetic):
        async def rollouts(self, task: Any, num_rollouts: int, policy: Any) -> list[Rollout]:
            return await super().rollouts(task, num_rollouts - 1, policy)

    sink = Watched()
    with pytest.raises(SynclineError, match="made 1 rollouts, asked for 2"):
        asyncio.run(run_until(worker(Short(), sink), lambda: False))


def test_a_worker_that_is_stopped_does_not_wait_for_a_sink_that_is_away(monkeypatch):
    class Away(Watched):
        async def permits(self, environment: str, num_permits: int, *, timeout_seconds: float) -> list[Permit]:
            asked.append(environment)
            await asyncio.Event().wait()
            raise AssertionError

    asked: list[str] = []
    monkeypatch.setattr(module, "STOP_SECONDS", 0.0)
    asyncio.run(run_until(worker(Arithmetic(seed=3), Away()), lambda: bool(asked)))
