"""Engines that are none of ours, and more connections than a process may open files."""

import asyncio
import resource
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from syncline.errors import ConfigError, EngineError
from syncline.offline.replica import OTHER_FILES, EngineReplica, allow_connections
from syncline.types import SamplingParams


def test_limit_of_open_files_is_raised_as_far_as_it_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = [(1024, 4096)]
    monkeypatch.setattr(resource, "getrlimit", lambda which: limits[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda which, wanted: limits.append(wanted))
    allow_connections(1024 - OTHER_FILES, field="eval.concurrency")
    assert len(limits) == 1
    allow_connections(2000, field="eval.concurrency")
    assert limits[-1] == (2000 + OTHER_FILES, 4096)
    with pytest.raises(ConfigError, match=r"eval\.concurrency: 5000 connections .* may open 4096 files"):
        allow_connections(5000, field="eval.concurrency")


def ask(body: bytes, what: Callable[[EngineReplica], Awaitable[Any]]) -> Any:
    """Of a server that answers everything with `body`."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
        writer.close()

    async def asked() -> Any:
        async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
            url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            async with EngineReplica(url, timeout_seconds=5, max_connections=1) as replica:
                return await what(replica)

    return asyncio.run(asked())


@pytest.mark.parametrize("body", [b"", b"OK", b'{"status": "ok"}', b"[]"])
def test_a_server_that_tells_no_digest_is_named(body: bytes) -> None:
    """Such as vLLM's own, whose `/health` is empty."""
    with pytest.raises(EngineError, match=r"engine http://127\.0\.0\.1:\d+ told no digest at /health"):
        ask(body, lambda replica: replica.digest())


@pytest.mark.parametrize("logprobs", ["[null]", "[1e999]", "[]"])
def test_a_completion_that_is_none_is_the_engines_fault(logprobs: str) -> None:
    """A model whose logits are NaN has log-probabilities that JSON writes as null."""
    one = f'{{"token_ids": [3], "logprobs": {logprobs}, "versions": [], "finish_reason": "stop"}}'
    with pytest.raises(EngineError, match=r"engine http://127\.0\.0\.1:\d+ answered no completion \(.*logprobs"):
        ask(f'{{"completions": [{one}]}}'.encode(), lambda replica: replica.generate((1,), SamplingParams(4)))
