"""The Atropos wire's rules with a clock in hand: who waits for whom, whose turn it is, what `/status` says of it."""

import asyncio
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from atropos_servers import our_server, registration, scored
from atroposlib.envs.base import BaseEnv

from syncline.trajectory import atropos_run


@pytest.fixture
def server(tmp_path):
    with our_server(tmp_path) as server:
        yield server


def fill_up(server, env_id=None) -> int:
    """Pushes until the queue is full; how many went in."""
    for mark in range(1000):
        if server.post("/scored_data", scored(mark, env_id=env_id)).status_code == 429:
            return mark
    raise AssertionError("the queue has no bound")


def test_status_says_what_is_missing_and_who_is_silent(server):
    assert "no learner has started" in server.get("/status").json()["why_waiting"]
    server.start(batch_size=8)
    assert server.get("/status").json()["why_waiting"] == "0 of 8 sequences are queued: no environment has registered"
    server.push(scored(0, env_id=server.register_env()))
    server.clock.now += 7
    why = "2 of 8 sequences are queued: 'math_0' has 2 queued, its last came 7.0 s ago"
    assert server.get("/status").json()["why_waiting"] == why
    assert server.get("/batch").json() == {"batch": None, "why_waiting": why}


def test_a_promised_share_is_in_every_batch_of_an_environment_that_delivers(server):
    server.start(batch_size=4)
    slow, fast = server.register_env(min_batch_allocation=0.5), server.register_env()
    server.push(*(scored(mark, env_id=fast) for mark in range(4)), scored(10, env_id=slow), scored(11, env_id=slow))
    assert [server.batch(), server.batch(), server.batch()] == [[0, 10], [1, 11], None]
    server.clock.now += atropos_run.PATIENCE_SECONDS - 1
    assert "is waited for 1 s more" in server.get("/batch").json()["why_waiting"]
    server.clock.now += 1
    assert server.batch() == [2, 3]


def test_a_full_queue_waits_for_no_promise(server):
    server.start(batch_size=4)
    server.register_env(min_batch_allocation=0.5)
    fill_up(server, server.register_env())
    assert server.batch() == [0, 1]


def test_a_size_that_seldom_fits_is_served_in_the_end(server):
    server.start(batch_size=8)
    server.push(scored(99, 6))
    served = []
    for mark in range(0, 40, 2):
        server.push(scored(mark, 4), scored(mark + 1, 4))
        served.append(server.batch())
    assert served[: atropos_run.BATCHES_AHEAD] == [[i, i + 1] for i in range(0, 2 * atropos_run.BATCHES_AHEAD, 2)]
    assert served[atropos_run.BATCHES_AHEAD] == [99]


def test_an_environment_that_left_keeps_no_share_of_the_weights(server):
    server.start()
    first, second = server.register_env(), server.register_env(weight=3.0)
    assert server.status_env(first).json()["env_weight"] == 0.25
    server.post("/disconnect-env", {"env_id": second})
    assert server.status_env(first).json()["env_weight"] == 1.0
    third = server.register_env()
    server.clock.now += atropos_run.PATIENCE_SECONDS
    assert server.status_env(third).json()["env_weight"] == 1.0, "the first died without a word"


def test_a_batch_that_a_trainer_finished_with_is_forgotten_in_the_end(server):
    """With a checkpoint every step the last two batches are kept for a trainer that starts again."""
    server.start(batch_size=2, save_checkpoint_interval=1)
    for mark in range(6):
        server.push(scored(mark))
        assert server.batch() == [mark]
    status = server.get("/status").json()
    assert (status["num_consumed"], status["counters"]["trained"]) == (2, 4)
    server.register(batch_size=2, starting_step=4)
    assert [server.batch(), server.batch(), server.batch()] == [[4], [5], None]


def test_a_list_that_is_taken_in_part_and_sent_again_is_taken_once(server):
    server.start(batch_size=2)
    server.register_env()
    groups = [scored(mark) for mark in range(100)]
    assert server.post("/scored_data_list", groups).status_code == 429
    taken = server.get("/status").json()["num_queued"]
    assert [server.batch() for _ in range(taken)] == [[mark] for mark in range(taken)]
    assert server.post("/scored_data_list", groups[: taken + 1]).status_code == 200
    assert [server.batch(), server.batch()] == [[taken], None]


def test_uploads_that_wait_while_everything_is_reset_keep_nobody_else(tmp_path):
    """They asked for environments that are no more; the next trainer's are served meanwhile."""
    with our_server(tmp_path, hold_seconds=20.0) as server:
        server.start(batch_size=2)
        env = server.register_env()
        for mark in range(8):
            server.push(scored(mark, env_id=env))

        async def scenario() -> list[int]:
            transport = httpx.ASGITransport(server.http.app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000") as http:
                waiting = asyncio.create_task(http.post("/scored_data", json=scored(9, env_id=env)))
                while not await server.http.app.state.turns.take(lambda queue: len(queue.asks)):
                    await asyncio.sleep(0.01)
                await http.get("/reset_data")
                await http.post("/register", json=registration(batch_size=2))
                answers = [await http.post("/scored_data", json=scored(10 + mark)) for mark in range(2)]
                done = waiting.done()
                waiting.cancel()
                return [done, *(answer.status_code for answer in answers)]

        assert server.http.portal.call(scenario) == [False, 200, 200]


def test_uploads_wait_for_room_in_the_order_of_the_weights(tmp_path):
    """Three of one environment for one of the other, whoever came first, while a slow trainer makes room."""
    with our_server(tmp_path, hold_seconds=20.0) as server:
        server.start(batch_size=2)
        server.register_env()
        for mark in range(8):
            server.push(scored(mark))
        light, heavy = server.register_env(weight=1.0), server.register_env(weight=3.0)
        names = {light: "light", heavy: "heavy"}

        async def push(http: httpx.AsyncClient, env_id: int, mark: int) -> None:
            answer = await http.post("/scored_data", json=scored(100 * (env_id + 1) + mark, env_id=env_id))
            assert answer.status_code == 200

        async def scenario() -> list[str]:
            transport = httpx.ASGITransport(server.http.app)
            async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000") as http:
                waiting = [asyncio.create_task(push(http, env, mark)) for env in names for mark in range(16)]
                while await server.http.app.state.turns.take(lambda queue: len(queue.asks)) < len(waiting):
                    await asyncio.sleep(0.01)
                served: list[str] = []
                while len(served) < 8 + 16:
                    batch = (await http.get("/batch")).json()["batch"]
                    served += [] if batch is None else [names.get(group["env_id"], "first") for group in batch]
                for task in waiting:
                    task.cancel()
                return served

        served = server.http.portal.call(scenario)
        assert served[:8] == ["first"] * 8
        assert 11 <= served[8:].count("heavy") <= 13


def test_the_client_of_theirs_survives_a_queue_that_is_full(tmp_path, caplog):
    """Its own code sends: it is held until there is no more hope, told 429, logs it and goes on."""
    with our_server(tmp_path) as server:
        server.start(batch_size=2)
        env_id = server.register_env()
        fill_up(server, env_id)
        env = SimpleNamespace(config=SimpleNamespace(rollout_server_url=""), env_id=env_id)
        env._post_json_with_compression = lambda _, path, group: _Answer(server.post(path, group))
        asyncio.run(BaseEnv._send_scored_data_to_api(env, scored(77)))
        assert "Client error: 429, not retrying" in caplog.text
        assert server.batch() == [0]
        asyncio.run(BaseEnv._send_scored_data_to_api(env, scored(78)))
        assert server.get("/latest_example").json()["tokens"][0][1] == 78


class _Answer:
    """An aiohttp response, as far as that client looks at it."""

    def __init__(self, answer: Any) -> None:
        self._answer, self.status = answer, answer.status_code

    async def __aenter__(self) -> "_Answer":
        return self

    async def __aexit__(self, *_: object) -> None: ...

    async def text(self) -> str:
        return self._answer.text


def test_only_so_many_bytes_of_uploads_wait_for_room(tmp_path):
    """The others are told at once, and what waited is forgotten when its sender gives up."""
    with our_server(tmp_path, hold_seconds=20.0, max_request_bytes=2000) as server:
        server.start(batch_size=2)
        env_id = server.register_env()
        for mark in range(8):
            server.push(scored(mark, env_id=env_id))

        async def scenario() -> None:
            turns = server.http.app.state.turns
            transport = httpx.ASGITransport(server.http.app)
            async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000") as http:

                async def push(mark: int) -> httpx.Response:
                    return await http.post("/scored_data", json=scored(mark, env_id=env_id))

                for _ in range(2):
                    waiting = [asyncio.create_task(push(100 + mark)) for mark in range(40)]
                    done, held = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                    while len(done) + await turns.take(lambda queue: len(queue.asks)) < len(waiting):
                        done, held = await asyncio.wait(waiting, timeout=0.05)
                    assert {answer.result().status_code for answer in done} == {429}
                    assert "bytes of groups wait for room already" in done.pop().result().json()["error"]
                    assert 5 <= len(held) <= 15
                    for task in held:
                        task.cancel()
                    await asyncio.wait(held)

        server.http.portal.call(scenario)


def test_a_store_that_may_not_grow_says_so(server, monkeypatch):
    server.start(batch_size=2)
    store = server.http.app.state.turns._store
    monkeypatch.setattr(store, "_max_bytes", store.stored_bytes())
    answer = server.post("/scored_data", scored(0))
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "5")
    assert "trajectory.max_store_bytes" in answer.json()["error"]


def test_a_wall_clock_that_jumps_moves_no_deadline(tmp_path, monkeypatch):
    """An administrator sets the date, years on and back: what is leased stays leased, and nobody counts as silent."""
    with our_server(tmp_path) as server:
        server.start(batch_size=2)
        server.register_env()
        server.push(scored(0), scored(1))
        before = server.get("/status").json()
        for years in (30, -30):
            monkeypatch.setattr("time.time", lambda now=1.7e9 + years * 3.2e7: now)
            assert server.get("/status").json() == before
        assert [server.batch(), server.batch(), server.batch()] == [[0], [1], None]
