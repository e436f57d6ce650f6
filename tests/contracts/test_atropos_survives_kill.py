"""`kill -9` of the real server while atroposlib's own client pushes and a trainer of its API pulls."""

import asyncio
import socket
import threading
import time
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from atropos_servers import environment, registration, scored
from atroposlib.envs.base import BaseEnv
from tenacity import RetryError
from trajectory_process import TrajectoryProcess

NUM_GROUPS = 48
NUM_WORKERS = 4


@pytest.fixture
def server(tmp_path):
    server = TrajectoryProcess(tmp_path)
    server.wait_until_ready()
    yield server
    server.kill()


def client(url: str, env_id: int) -> Any:
    """What `BaseEnv` needs to send a group; the code that sends it is its own."""
    env = SimpleNamespace(config=SimpleNamespace(rollout_server_url=url), env_id=env_id)
    env._post_json_with_compression = lambda *args: BaseEnv._post_json_with_compression(env, *args)
    return env


class Crash:
    """Kills the server and starts it again when `after` events of a kind have happened."""

    def __init__(self, server: TrajectoryProcess, *, pushed: int | None = None, pulled: int | None = None) -> None:
        self.pushed: list[int] = []
        self.pulled: dict[str, list[list[int]]] = {}
        self._server = server
        self._at = {"pushed": pushed, "pulled": pulled}
        self._guard = threading.Lock()

    def note(self, kind: str) -> None:
        with self._guard:
            if len(getattr(self, kind)) == self._at[kind]:
                self._at[kind] = None
                self._server.kill()
                self._server.restart()


def push(url: str, env_id: int, marks: list[int], crash: Crash) -> None:
    async def loop() -> None:
        for mark in marks:
            while True:
                with suppress(RetryError):  # its own three tries may all fall into the restart
                    await BaseEnv._send_scored_data_to_api(client(url, env_id), scored(mark))
                    break
            crash.pushed.append(mark)
            crash.note("pushed")

    asyncio.run(loop())


def pull(url: str, crash: Crash, *, expected: int) -> None:
    """A trainer: asks until it has seen every group, and comes again when the server is away."""
    deadline = time.monotonic() + 60
    while sum(len(answers[0]) for answers in crash.pulled.values()) < expected and time.monotonic() < deadline:
        try:
            answer = httpx.get(f"{url}/batch", timeout=10).json()
        except httpx.TransportError:
            answer = {"batch": None}
        if answer["batch"] is None:
            time.sleep(0.02)
            continue
        crash.pulled.setdefault(answer["batch_id"], []).append([group["tokens"][0][1] for group in answer["batch"]])
        crash.note("pulled")


@pytest.mark.parametrize("when", [{"pushed": 1}, {"pushed": 20}, {"pushed": 47}, {"pulled": 3}])
def test_every_group_reaches_the_trainer_in_one_batch(server, when):
    httpx.post(f"{server.url}/register", json=registration(batch_size=4, save_checkpoint_interval=50))
    httpx.get(f"{server.url}/batch")
    env_id = httpx.post(f"{server.url}/register-env", json=environment()).json()["env_id"]
    crash = Crash(server, **when)
    threads = [
        threading.Thread(target=push, args=(server.url, env_id, list(range(i, NUM_GROUPS, NUM_WORKERS)), crash))
        for i in range(NUM_WORKERS)
    ]
    trainer = threading.Thread(target=pull, args=(server.url, crash), kwargs={"expected": NUM_GROUPS})
    for thread in (trainer, *threads):
        thread.start()
    for thread in (*threads, trainer):
        thread.join(90)
    assert sorted(crash.pushed) == list(range(NUM_GROUPS))
    assert sorted(mark for answers in crash.pulled.values() for mark in answers[0]) == list(range(NUM_GROUPS))
    for answers in crash.pulled.values():
        assert all(answer == answers[0] for answer in answers), "a batch that is sent again is the same batch"


def test_a_trainer_that_reads_nothing_of_its_answer_gets_the_batch_again(server):
    """Its connection breaks off while the answer is on its way: more of it than sockets hold."""
    httpx.post(f"{server.url}/register", json=registration(batch_size=4, max_token_len=0))
    httpx.get(f"{server.url}/batch")
    long = [list(range(200_000)) for _ in range(4)]
    big = {"tokens": long, "masks": [[-100] * 200_000] * 4, "scores": [0.0, 1.0, 2.0, 3.0]}
    assert httpx.post(f"{server.url}/scored_data", json=big, timeout=60).status_code == 200
    with socket.socket() as trainer:
        trainer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        trainer.connect(("127.0.0.1", server.port))
        trainer.sendall(f"GET /batch HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\n\r\n".encode())
        assert trainer.recv(15) == b"HTTP/1.1 200 OK"
    deadline = time.monotonic() + 20
    while (again := httpx.get(f"{server.url}/batch", timeout=30).json())["batch"] is None:
        assert time.monotonic() < deadline, httpx.get(f"{server.url}/status").text
        time.sleep(0.05)
    assert again["batch"][0]["tokens"] == long
    while httpx.get(f"{server.url}/status").json()["current_step"] != 1:
        assert time.monotonic() < deadline
        time.sleep(0.05)
