"""What befalls a real server: a disk that is full, clients that dribble, bodies that make no sense, thousands of them.

`kill -9` has suites of its own; what the tables in docs/log.md say was observed is what these tests do.
"""

import asyncio
import itertools
import json
import random
import resource
import socket
from pathlib import Path

import httpx
import pytest
from atropos_servers import environment, registration, scored
from trajectory_process import TrajectoryProcess

from syncline.errors import TrajectoryError
from syncline.testing import make_group
from syncline.trajectory import wire
from syncline.trajectory.client import TrajectorySink, TrajectorySource

JSON = {"Content-Type": "application/json"}
NUM_GROUPS = 40


@pytest.fixture
def server(tmp_path):
    server = TrajectoryProcess(tmp_path, groups_per_step=NUM_GROUPS // 4)
    server.wait_until_ready()
    yield server
    server.kill()


def rss_mib(pid: int) -> float:
    return int(Path(f"/proc/{pid}/status").read_text().partition("VmRSS:")[2].split()[0]) / 1024


def group_body(task_index: int) -> bytes:
    noise = random.Random(task_index).randbytes(20_000).hex()
    return wire.encode_group(make_group("math", task_index)).replace(b'"messages":[]', _said(noise))


def _said(text: str) -> bytes:
    return b'"messages":' + json.dumps([{"role": "assistant", "content": text}]).encode()


def let_grow(server: TrajectoryProcess, num_bytes: int) -> None:
    resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (num_bytes, resource.RLIM_INFINITY))


def test_a_full_disk_is_said_loses_nothing_and_is_gone_with_its_cause(server):
    """The kernel lets the server's files grow no further, which SQLite meets as it meets a full disk."""
    with TrajectorySource(server.url, wait_timeout_seconds=10.0) as source, httpx.Client(base_url=server.url) as http:
        source.start(policy_version=0, step=0)
        ask = {"environment": "math", "worker": "0", "num_permits": NUM_GROUPS, "held": [], "timeout_seconds": 0.0}
        permits = http.post("/permits", json=ask).json()["permits"]
        let_grow(server, 300_000)
        taken: dict[int, int] = {}
        for permit in permits:
            body = group_body(permit["task_index"])
            answer = http.post(f"/groups?permit_id={permit['permit_id']}", content=body, headers=JSON)
            taken[permit["task_index"]] = answer.status_code
        refused = [index for index, status in taken.items() if status == 503]
        assert refused and set(taken.values()) == {200, 503}
        let_grow(server, 1)
        assert http.get("/health").status_code == 503
        let_grow(server, resource.RLIM_INFINITY)
        assert http.get("/health").status_code == 200
        for permit in permits:
            if permit["task_index"] in refused:
                body = group_body(permit["task_index"])
                answer = http.post(f"/groups?permit_id={permit['permit_id']}", content=body, headers=JSON)
                assert answer.status_code == 200, answer.text
        server.kill()
        server.restart()
        server.wait_until_ready()
        assert sorted(group.task_index for group in source.next_batch(NUM_GROUPS)) == list(range(NUM_GROUPS))


def test_clients_that_dribble_hold_up_nobody(server):
    """Thirty announce a body and send a byte of it; a whole step goes by meanwhile."""
    slow = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(30)]
    head = f"POST /scored_data HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\nContent-Type: application/json\r\n"
    for client in slow:
        client.sendall(f"{head}Content-Length: 100000\r\n\r\n{{".encode())

    async def sample() -> None:
        async with TrajectorySink(server.url) as sink:
            for permit in await sink.permits("math", 10, timeout_seconds=5.0):
                await sink.put(make_group("math", permit.task_index), permit)

    with TrajectorySource(server.url, wait_timeout_seconds=10.0) as source:
        source.start(policy_version=0, step=0)
        asyncio.run(asyncio.wait_for(sample(), 10))
        source.acknowledge(source.next_batch(10), step=1, policy_version=1)
        source.commit(step=1)
        assert httpx.get(f"{server.url}/status").json()["counters"]["trained"] == 10
    for client in slow:
        client.close()


def malformed(count: int) -> list[tuple[str, bytes, dict[str, str]]]:
    """Bodies of every kind that cannot be, to every route that takes one."""
    good = json.dumps(scored(0)).encode()
    drawn = random.Random(0)
    kinds = [
        lambda: (drawn.randbytes(drawn.randrange(1, 4000)), JSON),
        lambda: (good[: drawn.randrange(1, len(good) - 1)], JSON),
        lambda: (b"[" * drawn.randrange(1, 5000), JSON),
        lambda: (good.replace(b"0.0", drawn.choice([b"NaN", b"1e999", b'"a"', b"{}"])), JSON),
        lambda: (b'{"tokens": [[%d]]}' % drawn.randrange(1 << 200), JSON),
        lambda: (drawn.randbytes(100), JSON | {"Content-Encoding": "gzip"}),
        lambda: (good, {"Content-Type": "text/plain"}),
        lambda: (json.dumps(registration(batch_size=-1)).encode(), JSON),
    ]
    paths = ("/scored_data", "/scored_data_list", "/groups?permit_id=x", "/lease", "/acknowledge", "/register-env")
    turns = zip(range(count), itertools.cycle(kinds), strict=False)
    return [(drawn.choice(paths), *kind()) for _, kind in turns]


@pytest.mark.parametrize("count", [400, pytest.param(10_000, marks=pytest.mark.slow)])
def test_bodies_that_make_no_sense_are_refused_and_leave_nothing_behind(server, count):
    httpx.post(f"{server.url}/register", json=registration(batch_size=2, max_token_len=0))
    httpx.get(f"{server.url}/batch")
    httpx.post(f"{server.url}/register-env", json=environment())

    async def flood(bodies) -> list[int]:
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as http:
            statuses: list[int] = []

            async def client() -> None:
                for path, body, headers in bodies:
                    statuses.append((await http.post(path, content=body, headers=headers)).status_code)

            await asyncio.gather(*(client() for _ in range(16)))
            return statuses

    asyncio.run(flood(iter(malformed(200))))
    before = rss_mib(server.process.pid)
    statuses = asyncio.run(flood(iter(malformed(count))))
    assert len(statuses) == count
    assert set(statuses) <= {400, 409, 413, 415, 422}
    assert rss_mib(server.process.pid) < before + 20
    assert httpx.post(f"{server.url}/scored_data", json=scored(7)).json() == {"status": "received"}
    assert httpx.get(f"{server.url}/batch").json()["batch"][0]["tokens"] == scored(7)["tokens"]


def test_a_store_that_may_not_grow_stops_sampling_says_why_and_goes_on_after_a_checkpoint(tmp_path):
    server = TrajectoryProcess(tmp_path, groups_per_step=4, max_store_bytes=200_000)
    try:
        server.wait_until_ready()
        asyncio.run(_fill_and_free(server.url))
    finally:
        server.kill()


async def _fill_and_free(url: str) -> None:
    async with httpx.AsyncClient(base_url=url) as http:

        async def permits() -> httpx.Response:
            ask = {"environment": "math", "worker": "0", "num_permits": 1, "held": [], "timeout_seconds": 0.0}
            return await http.post("/permits", json=ask)

        with TrajectorySource(url, wait_timeout_seconds=0.0, retry_seconds=0.0) as source:
            source.start(policy_version=0, step=0)
            step = 0
            while (answer := await permits()).status_code == 200:
                [permit] = answer.json()["permits"]
                body = group_body(permit["task_index"]).replace(b'"policy_version":0', b'"policy_version":%d' % step)
                path = f"/groups?permit_id={permit['permit_id']}"
                assert (await http.post(path, content=body, headers=JSON)).status_code == 200
                step += 1
                source.acknowledge(source.next_batch(1), step=step, policy_version=step)
            assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
            assert "trajectory.max_store_bytes = 200000; room comes back when the learner commits" in answer.text
            with pytest.raises(TrajectoryError, match=r"0 of 1 groups are queued.*max_store_bytes = 200000"):
                source.next_batch(1)
            source.commit(step=step)
            assert (await permits()).status_code == 200
