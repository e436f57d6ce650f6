"""`kill -9` of the real server while groups arrive: what was acknowledged is there, once; the clients ride it out."""

import asyncio
import random
import threading

import pytest
from trajectory_process import TrajectoryProcess

from syncline.testing import make_group
from syncline.trajectory.client import TrajectorySink, TrajectorySource

NUM_GROUPS = 60
NUM_WORKERS = 4


@pytest.fixture
def server(tmp_path):
    server = TrajectoryProcess(tmp_path, groups_per_step=NUM_GROUPS // 4)
    yield server
    server.kill()


class Crash:
    """Kills the server when the `after`-th group has been acknowledged, the other workers being in mid-request.

    The learner lives on and is heard again by the next server, which grants nothing before that.
    """

    def __init__(self, server: TrajectoryProcess, source: TrajectorySource, *, after: int) -> None:
        self.put: list[int] = []
        self._server = server
        self._source = source
        self._after = after
        self._guard = threading.Lock()

    def note(self, task_index: int) -> None:
        with self._guard:
            self.put.append(task_index)
            if len(self.put) == self._after:
                self._server.kill()
                self._server.restart()
                self._source.commit(step=0)


def sample(url: str, worker: str, crash: Crash) -> None:
    """A worker: takes permits and puts groups until the capacity is used up."""

    async def loop() -> None:
        async with TrajectorySink(url, worker=worker) as sink:
            while permits := await sink.permits("math", 3, timeout_seconds=5.0):
                for permit in permits:
                    await sink.put(make_group("math", permit.task_index), permit)
                    crash.note(permit.task_index)

    asyncio.run(loop())


@pytest.mark.parametrize("after", [1, random.Random(0).randrange(2, 30), random.Random(1).randrange(30, 55)])
def test_every_acknowledged_group_is_there_exactly_once(server, after):
    server.wait_until_ready()
    with TrajectorySource(server.url, wait_timeout_seconds=30.0) as source:
        source.start(policy_version=0, step=0)
        crash = Crash(server, source, after=after)
        workers = [
            threading.Thread(target=sample, args=(server.url, f"{i}", crash), daemon=True) for i in range(NUM_WORKERS)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(60)
        groups = source.next_batch(NUM_GROUPS)
    assert sorted(crash.put) == list(range(NUM_GROUPS))
    assert sorted(group.task_index for group in groups) == list(range(NUM_GROUPS))


def test_a_killed_worker_and_a_killed_server_lose_no_task(server):
    """Permits of a dead worker go to its successor at once, also by a server that has restarted meanwhile."""

    async def take(num_permits: int) -> list[int]:
        async with TrajectorySink(server.url) as sink:
            return [permit.task_index for permit in await sink.permits("math", num_permits, timeout_seconds=0.0)]

    server.wait_until_ready()
    with TrajectorySource(server.url) as source:
        source.start(policy_version=0, step=0)
        assert asyncio.run(take(NUM_GROUPS)) == list(range(NUM_GROUPS))
        server.kill()
        server.restart()
        assert asyncio.run(take(3)) == [], "no learner was heard by this server: the engine may serve anything"
        source.commit(step=0)
        assert asyncio.run(take(3)) == [0, 1, 2]
