"""Under `http_proxy` servers of this machine and its network are asked directly, by every client; others as it says."""

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from syncline.config.proxies import is_near
from syncline.engines.client import EngineClient, EngineController
from syncline.envs.judge import Endpoint, Judge
from syncline.errors import EngineError
from syncline.offline.replica import EngineReplica
from syncline.trajectory.client import TrajectorySink, TrajectorySource
from syncline.types import SamplingParams

FAR = "http://engines.example.com:8000"
ANSWERS: dict[str, Any] = {
    "/health": {"status": "ok", "digest": "0123"},
    "/syncline/generate": {"completions": []},
    "/permits": {"permits": []},
    "/status": {"num_queued": 3, "environments": {}, "counters": dict.fromkeys(
        ("stale", "rewound", "failed", "abandoned", "expired_permits", "replaced", "unreplaced"), 0
    )},
    "/v1/chat/completions": {"choices": [{"message": {"content": "Score: 7"}}]},
}  # fmt: skip


@contextmanager
def answering() -> Iterator[tuple[str, list[str]]]:
    """A server, or a proxy, that answers what each client asks: its URL and the requests it has had."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            body = next(json.dumps(answer).encode() for path, answer in ANSWERS.items() if self.path.endswith(path))
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET

        def log_message(self, *args: object) -> None:
            del args

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What the proxy of the environment was asked."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    with answering() as (url, asked):
        monkeypatch.setenv("http_proxy", url)
        yield asked


def by_controller(url: str) -> None:
    controller = EngineController(url, timeout_seconds=5)
    controller.health()
    controller.close()


def by_source(url: str) -> None:
    with TrajectorySource(url, retry_seconds=0) as source:
        assert source.metrics()["queue/length"] == 3


def by_sink(url: str) -> None:
    asyncio.run(used(TrajectorySink(url, retry_seconds=0), lambda sink: sink.permits("e", 1, timeout_seconds=0)))


def by_client(url: str) -> None:
    client = EngineClient(url, timeout_seconds=5)
    asyncio.run(used(client, lambda client: client.attempt([1], SamplingParams(1))))


def by_replica(url: str) -> None:
    replica = EngineReplica(url, timeout_seconds=5, max_connections=1)
    assert asyncio.run(used(replica, lambda replica: replica.digest())) == "0123"


def by_judge(url: str) -> None:
    judge = Judge(Endpoint(url=f"{url}/v1", model="m"), rubric="r")
    assert asyncio.run(used(judge, lambda judge: judge.grade("task", "answer"))) == 0.7


async def used(client: Any, ask: Callable[[Any], Any]) -> Any:
    async with client:
        return await ask(client)


CLIENTS = {
    "engine, controller": by_controller,
    "engine, client": by_client,
    "engine, offline": by_replica,
    "trajectories, learner": by_source,
    "trajectories, environment": by_sink,
    "judge": by_judge,
}


@pytest.mark.parametrize("client", CLIENTS)
def test_this_machine_is_asked_past_the_proxy(client: str, proxy: list[str]) -> None:
    with answering() as (url, asked):
        CLIENTS[client](url)
    assert len(asked) == 1 and not proxy


@pytest.mark.parametrize("client", CLIENTS)
def test_a_server_out_there_is_asked_through_it(client: str, proxy: list[str]) -> None:
    CLIENTS[client](FAR)
    [asked] = proxy
    assert asked.startswith(FAR)


@pytest.mark.parametrize("name", ["no_proxy", "NO_PROXY"])
def test_what_no_proxy_names_is_not(name: str, proxy: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "a.example,example.com")
    with pytest.raises(EngineError):
        by_controller("http://engines.example.com:9")
    with pytest.raises(EngineError):
        by_client("http://engines.example.com:9")
    assert not proxy


def test_a_kind_of_proxy_that_is_not_installed_is_no_matter_to_it(
    proxy: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """httpx refuses to be made at all under a SOCKS proxy without its package."""
    monkeypatch.setenv("all_proxy", "socks5://127.0.0.1:9")
    with answering() as (url, asked):
        for ask in CLIENTS.values():
            ask(url)
    assert len(asked) == len(CLIENTS) and not proxy


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.2",
        "[::1]",
        "localhost",
        "10.1.2.3",
        "192.168.7.8",
        "172.31.0.4",
        "169.254.1.1",
        "100.64.3.2",
        "[fd00::5]",
        "0.0.0.0",
        "node07",
        "engine.localhost",
    ],
)
def test_near(host: str) -> None:
    assert is_near(f"http://{host}:8000/v1")


@pytest.mark.parametrize("host", ["8.8.8.8", "engines.example.com", "172.32.0.1", "[2600::1]", "api.openai.com"])
def test_far(host: str) -> None:
    assert not is_near(f"https://{host}/v1")
