"""Deadlines that name the engine, and answers that become types."""

import asyncio
import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from real_engine import free_port

from syncline.engines.client import AtGate, EngineClient, EngineController, NotReady
from syncline.errors import ConfigError, EngineError, EngineGone, EngineTimeout
from syncline.observe.images import image_ref
from syncline.types import Completion, FinishReason, SamplingParams, VersionSpan


class Canned(BaseHTTPRequestHandler):
    """Answers every request with the server's next (status, body); the last one again and again."""

    def do_POST(self) -> None:
        self.server.bodies.append(self.rfile.read(int(self.headers.get("Content-Length", 0))))  # type: ignore[attr-defined]
        answers = self.server.answers  # type: ignore[attr-defined]
        status, body = answers.pop(0) if len(answers) > 1 else answers[0]
        self.send_response(status)
        if isinstance(body, dict) and "paused" in body:
            self.send_header("Retry-After", "0")
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    do_GET = do_POST

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def canned() -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Canned)
    server.bodies = []  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def url_of(server: ThreadingHTTPServer) -> str:
    return f"http://127.0.0.1:{server.server_address[1]}"


def generate(url: str, **options) -> list:
    async def call() -> list:
        async with EngineClient(url, **options) as client:
            return await client.generate((1, 2), SamplingParams(4))

    return asyncio.run(call())


ANSWER = {
    "completions": [
        {"token_ids": [7, 8], "logprobs": [-0.5, -0.25], "versions": [[3, 0, 2]], "finish_reason": "stop"},
    ]
}


def test_an_answer_becomes_a_completion(canned: ThreadingHTTPServer) -> None:
    canned.answers = [(200, ANSWER)]  # type: ignore[attr-defined]
    [completion] = generate(url_of(canned), timeout_seconds=5)
    assert completion.token_ids == (7, 8)
    assert completion.versions == (VersionSpan(3, 0, 2),)
    assert completion.finish_reason is FinishReason.STOP


def test_a_starting_engine_is_waited_for(canned: ThreadingHTTPServer) -> None:
    canned.answers = [(503, {"status": "starting"}), (200, ANSWER)]  # type: ignore[attr-defined]
    assert len(generate(url_of(canned), timeout_seconds=5)) == 1


def test_a_refusal_is_an_error_at_once_with_the_engines_words(canned: ThreadingHTTPServer) -> None:
    canned.answers = [(409, {"error": "pause it first"})]  # type: ignore[attr-defined]
    with pytest.raises(EngineError, match=r"409.*pause it first"):
        generate(url_of(canned), timeout_seconds=5)


def test_an_engine_that_is_not_there_is_named_at_the_deadline() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(EngineTimeout, match=url):
        generate(url, timeout_seconds=0.3)
    with pytest.raises(EngineTimeout, match=f"engine at {url} was not ready after 0.3 s"):
        EngineController(url, timeout_seconds=1).wait_until_ready(timeout_seconds=0.3)


def test_an_engine_that_is_silent_or_breaks_off_is_named(canned: ThreadingHTTPServer) -> None:
    canned.answers = [(200, ANSWER)]  # type: ignore[attr-defined]
    silent = threading.Event()
    canned.RequestHandlerClass = type("Silent", (Canned,), {"do_POST": lambda self: silent.wait(20)})
    with pytest.raises(EngineTimeout, match=r"engine http://\S+ did not answer /syncline/generate in 0\.3 s"):
        generate(url_of(canned), timeout_seconds=0.3)
    silent.set()
    canned.RequestHandlerClass = type("Broken", (Canned,), {"do_POST": lambda self: self.connection.close()})
    with pytest.raises(EngineGone, match=r"engine http://\S+ broke off /syncline/generate"):
        generate(url_of(canned), timeout_seconds=5)


def test_an_engine_behind_a_path_is_asked_there(canned: ThreadingHTTPServer) -> None:
    asked = []

    class Noting(Canned):
        def do_POST(self) -> None:
            asked.append(self.path)
            super().do_POST()

    canned.answers, canned.RequestHandlerClass = [(200, ANSWER)], Noting  # type: ignore[attr-defined]
    generate(f"{url_of(canned)}/engines/7/", timeout_seconds=5)
    assert asked == ["/engines/7/syncline/generate"]


def test_unpublished_weights_have_no_version_unless_the_caller_names_one(canned: ThreadingHTTPServer) -> None:
    unversioned = {"completions": [ANSWER["completions"][0] | {"versions": []}]}
    canned.answers = [(200, unversioned)]  # type: ignore[attr-defined]
    assert generate(url_of(canned), timeout_seconds=5)[0].versions == ()
    [completion] = generate(url_of(canned), timeout_seconds=5, unpublished_version=0)
    assert completion.versions == (VersionSpan(0, 0, 2),)


def test_images_are_sent_by_content_and_refused_once_changed(canned: ThreadingHTTPServer, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"a picture")
    image = image_ref(tmp_path / "a.png")
    canned.answers = [(200, ANSWER | {"prompt_token_ids": [1, 9, 9, 2]})]  # type: ignore[attr-defined]

    async def ask() -> list[Completion]:
        async with EngineClient(url_of(canned), timeout_seconds=5) as client:
            return await client.generate((1, 9, 2), SamplingParams(4), images=[image])

    [completion] = asyncio.run(ask())
    assert completion.prompt_token_ids == (1, 9, 9, 2)
    asked = json.loads(canned.bodies[-1])  # type: ignore[attr-defined]
    assert [base64.b64decode(one) for one in asked["images"]] == [b"a picture"]
    (tmp_path / "a.png").write_bytes(b"another")
    with pytest.raises(ConfigError, match=r"a\.png: has sha256"):
        asyncio.run(ask())


def test_so_many_are_asked_at_once_and_no_more() -> None:
    """Nobody is answered until as many have come as may; more than these never do."""
    allowed = 12
    full, counting = threading.Barrier(allowed), threading.Lock()
    now, most = 0, 0

    class Held(Canned):
        def do_POST(self) -> None:
            nonlocal now, most
            with counting:
                now += 1
                most = max(most, now)
            full.wait(timeout=20)  # breaks where fewer come, and nobody is answered
            with counting:
                now -= 1
            super().do_POST()

    class Server(ThreadingHTTPServer):
        request_queue_size = allowed

    server = Server(("127.0.0.1", 0), Held)
    server.bodies, server.answers = [], [(200, ANSWER)]  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()

    async def ask() -> list[list[Completion]]:
        async with EngineClient(url_of(server), timeout_seconds=30, max_connections=allowed) as client:
            return await asyncio.gather(*(client.attempt((1, 2), SamplingParams(4)) for _ in range(2 * allowed)))

    try:
        assert len(asyncio.run(ask())) == 2 * allowed
    finally:
        server.shutdown()
        server.server_close()
    assert most == allowed


@pytest.mark.parametrize(("told", "kind"), [({"error": "starting"}, NotReady), ({"paused": "for 5 s"}, AtGate)])
def test_a_request_that_was_kept_at_a_gate_is_told_from_one_that_was_not(
    canned: ThreadingHTTPServer, told: dict[str, str], kind: type[NotReady]
) -> None:
    async def attempt() -> None:
        async with EngineClient(url_of(canned), timeout_seconds=5) as client:
            await client.attempt((1, 2), SamplingParams(4), needs_version=True)

    canned.answers = [(503, told)]  # type: ignore[attr-defined]
    with pytest.raises(NotReady, match=next(iter(told.values()))) as refused:
        asyncio.run(attempt())
    assert refused.type is kind
