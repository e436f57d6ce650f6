"""What environments and learner may rely on, whichever `RolloutSink` and `RolloutSource` they hold.

One suite over the shipped fake and over the real server: a process, HTTP, a store on disk.
"""

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from trajectory_process import TrajectoryProcess

from syncline.errors import TrajectoryError
from syncline.protocols import Permit, RolloutSink, RolloutSource
from syncline.testing import InMemoryTrajectories, make_group
from syncline.trajectory.client import TrajectorySink, TrajectorySource


@dataclass
class Ends:
    """Both ends of one trajectory queue; the environment's end is entered for every call, as if by many workers."""

    source: RolloutSource
    new_source: Callable[[], RolloutSource]
    call_sink: Callable[[Callable[[RolloutSink], Any]], Any]

    def permits(self, num_permits: int, environment: str = "math") -> list[Permit]:
        return self.call_sink(lambda sink: sink.permits(environment, num_permits, timeout_seconds=0.0))

    def put(self, permit: Permit, **group: Any) -> None:
        self.call_sink(lambda sink: sink.put(make_group("math", permit.task_index, **group), permit))

    def give_back(self, permit: Permit) -> None:
        self.call_sink(lambda sink: sink.give_back(permit, "sandbox down"))

    def fill(self, num_groups: int, **group: Any) -> list[Permit]:
        permits = self.permits(num_groups)
        for permit in permits:
            self.put(permit, **group)
        return permits


def fake_ends() -> Iterator[Ends]:
    fake = InMemoryTrajectories(max_permits=4)
    yield Ends(fake, lambda: fake, lambda call: asyncio.run(call(fake)))


def real_ends(run_dir) -> Iterator[Ends]:
    server = TrajectoryProcess(run_dir)
    try:
        server.wait_until_ready()
        with (
            TrajectorySource(server.url, wait_timeout_seconds=0.0) as source,
            TrajectorySource(server.url, wait_timeout_seconds=0.0) as successor,
            asyncio.Runner() as runner,
        ):
            sink = TrajectorySink(server.url)
            yield Ends(source, lambda: successor, lambda call: runner.run(call(sink)))
            runner.run(sink.__aexit__())
        assert server.stop() == 0
    finally:
        server.kill()


@pytest.fixture(params=["fake", "real"])
def ends(request, tmp_path) -> Iterator[Ends]:
    yield from fake_ends() if request.param == "fake" else real_ends(tmp_path)


def indices(groups) -> list[int]:
    return [group.task_index for group in groups]


def test_tasks_are_handed_out_in_order_and_returned_ones_first(ends):
    ends.source.start(policy_version=0, step=0)
    permits = ends.permits(3)
    assert [permit.task_index for permit in permits] == [0, 1, 2]
    assert [permit.task_index for permit in ends.permits(1, "code")] == [0]
    assert ends.permits(1) == []
    ends.give_back(permits[1])
    ends.give_back(permits[1])
    assert [permit.task_index for permit in ends.permits(1)] == [1]


def test_a_group_put_twice_is_leased_once_and_arrives_unchanged(ends):
    ends.source.start(policy_version=0, step=0)
    first, second = ends.permits(2)
    for permit in (second, second, first, second):
        ends.put(permit, rewards=(1 / 3, None))
    expected = [make_group("math", index, rewards=(1 / 3, None)) for index in (1, 0)]
    assert ends.source.next_batch(2) == expected
    with pytest.raises(TrajectoryError):
        ends.source.next_batch(1)


def test_a_permit_is_good_for_its_own_task_once(ends):
    ends.source.start(policy_version=0, step=0)
    first, second = ends.permits(2)
    with pytest.raises(TrajectoryError):
        ends.put(Permit(first.permit_id, second.task_index))
    with pytest.raises(TrajectoryError):
        ends.put(Permit("never-granted", 0))
    ends.put(first)
    with pytest.raises(TrajectoryError):
        ends.put(first, group_id="another")
    with pytest.raises(TrajectoryError):
        ends.give_back(first)
    ends.give_back(second)
    with pytest.raises(TrajectoryError):
        ends.put(second)


def test_batches_are_whole_and_oldest_first(ends):
    ends.source.start(policy_version=0, step=0)
    ends.fill(3)
    with pytest.raises(TrajectoryError):
        ends.source.next_batch(4)
    assert indices(ends.source.next_batch(1)) == [0]
    assert indices(ends.source.next_batch(2)) == [1, 2]


def test_only_leased_groups_can_be_acknowledged(ends):
    ends.source.start(policy_version=0, step=0)
    ends.fill(1)
    with pytest.raises(TrajectoryError):
        ends.source.acknowledge([make_group("math", 7)], step=1, policy_version=1)


def test_a_restart_hands_out_what_lost_steps_consumed_and_nothing_committed(ends):
    ends.source.start(policy_version=0, step=0)
    ends.fill(4)
    for step in (1, 2):
        ends.source.acknowledge(ends.source.next_batch(1), step=step, policy_version=step)
    ends.source.commit(step=1)
    ends.source.next_batch(1)
    learner = ends.new_source()
    learner.start(policy_version=1, step=1)
    assert indices(learner.next_batch(3)) == [1, 2, 3]


def test_a_restart_drops_groups_of_lost_policy_versions_and_their_tasks_go_out_again(ends):
    ends.source.start(policy_version=0, step=0)
    ends.fill(1)
    ends.source.acknowledge(ends.source.next_batch(1), step=1, policy_version=1)
    ends.fill(2, policy_version=1)
    learner = ends.new_source()
    learner.start(policy_version=0, step=0)
    assert indices(learner.next_batch(1)) == [0]
    assert [permit.task_index for permit in ends.permits(3)] == [1, 2, 3]


def test_metrics_count_the_groups_that_wait(ends):
    ends.source.start(policy_version=0, step=0)
    assert ends.source.metrics()["queue/length"] == 0
    ends.fill(3)
    assert ends.source.metrics()["queue/length"] == 3
    ends.source.next_batch(2)
    assert ends.source.metrics()["queue/length"] == 1
