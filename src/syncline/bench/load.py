"""Requests that run while something is measured, and when the tokens of those that are watched arrived; and how fast
an engine decodes when nothing else goes on.

The requests have their own process, so that reading them does not slow what is measured. It asks vLLM's own completion
route for endless random text, `--requests` at once, until its standard input closes; then it prints what it saw, on
the clock of `time.monotonic`, which processes of one host share.

Every streamed token costs the server, which is one process: where streams want more than it can do, it sends what the
engine made in several steps as one piece, late (vLLM's `RequestOutputCollector`). So about `WATCHED` of the requests
are streamed, and read for tokens once all is over; the others want their final answer alone, as rollouts do. The first
ones are of all lengths up to the full one: from then on one ends every few steps, never many together, and one that is
frozen is on average half as long as it will be.

    python -m syncline.bench.load --url http://127.0.0.1:8000 --requests 64
"""

import argparse
import asyncio
import json
import re
import subprocess
import sys
import time
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, chain, pairwise, repeat
from statistics import median
from typing import Any

import aiohttp
import httpx

from syncline.errors import EngineError

MAX_TOKENS = 1024
WATCHED = 16
PROMPT = list(range(20, 36))
TIMEOUT_SECONDS = 120.0
TURN_SECONDS = 2.0
TURNS_SECONDS = 60.0
"""After which no further turns are begun."""
FEWEST_TOKENS = 32
"""Of a completion in a turn: as many as leave the engine in one piece."""
_TOKENS = re.compile(rb'"token_ids":\[(\d[\d,]*)\]')

Pieces = list[tuple[float, bytes]]
"""When something of an answer was read, and what."""
Arrivals = list[tuple[float, int]]
"""When tokens of a request arrived, and how many."""


@dataclass(slots=True)
class Load:
    """What was seen of the requests; `watched` is filled when the `running` block ends."""

    watched: Sequence[Arrivals] = ()
    """Of each request, those of one stream after the other."""
    share: float = 1.0
    """Of the requests that are watched."""

    def tokens_per_second(self, start: float, end: float) -> float:
        """Of all requests, as many a request as of those that are watched."""
        seen = sum(num for request in self.watched for at, num in request if start <= at < end)
        return seen / self.share / (end - start)

    def tokens_a_piece(self) -> float:
        """Above 1: the server was late, and sent the tokens of several steps as one."""
        seen = [num for request in self.watched for _, num in request if num]
        return sum(seen) / max(1, len(seen))

    def pauses(self, start: float, end: float) -> list[float]:
        """Of each request that was running between `start` and `end`: how much longer than usual its longest wait for
        a token then was. A wait is between two tokens of one request: what lies between the end of one and the first
        token of the next (HTTP, a place in a queue, its prompt) is no pause."""
        waits = [[(before, after) for (before, _), (after, _) in pairwise(request)] for request in self.watched]
        usual = median([after - before for mine in waits for before, after in mine] or [0.0])
        then = ([after - before for before, after in mine if after > start and before < end] for mine in waits)
        return [max(0.0, max(seen) - usual) for seen in then if seen]


def watched_every(num_requests: int) -> int:
    return max(1, num_requests // WATCHED)


@contextmanager
def running(url: str, num_requests: int, *, max_tokens: int = MAX_TOKENS) -> Iterator[Load]:
    """The block runs while the requests do; afterwards `Load.watched` is known."""
    load = Load(share=len(range(0, num_requests, watched_every(num_requests))) / num_requests)
    argv = [sys.executable, "-m", __name__, "--url", url, "--requests", str(num_requests)]
    argv += ["--max-tokens", str(max_tokens)]
    process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        if process.stdout.readline().strip() != "running":
            raise RuntimeError(f"the load on {url} did not start")
        yield load
        printed, _ = process.communicate(timeout=TIMEOUT_SECONDS)
        if process.returncode:
            raise RuntimeError(f"the load on {url} failed")
        load.watched = json.loads(printed)
    finally:
        process.kill()
        process.wait()


def decode_in_turns(urls: Sequence[str], num_requests: int, *, turns: int) -> Iterator[list[float]]:
    """Tokens a second of each engine, turn by turn, first one then the other ahead: what drifts, drifts for both.

    In a turn an engine is asked for `num_requests` completions of one prompt, in one request, that end at the same
    length and whose answer comes when all have ended: neither HTTP nor a server's streams are measured with it. The
    first turn of each is not told: it warms up, and says which length takes `TURN_SECONDS`.
    """
    num_tokens, until = FEWEST_TOKENS, time.monotonic() + TURNS_SECONDS
    for turn in range(1 + turns):
        ahead = range(len(urls))[:: -1 if turn % 2 else 1]
        speeds = {i: _decode(urls[i], num_requests, num_tokens) for i in ahead}
        if turn:
            yield [speeds[i] for i in range(len(urls))]
            if time.monotonic() > until:
                return
        else:
            fitting = int(TURN_SECONDS * min(speeds.values()) / num_requests)
            num_tokens = min(MAX_TOKENS, max(FEWEST_TOKENS, fitting))


def _decode(url: str, num_requests: int, num_tokens: int) -> float:
    """Raises `EngineError` where a completion has not that many tokens."""
    asked: dict[str, Any] = {"prompt": {"prompt_token_ids": PROMPT}, "n": num_requests, "max_tokens": num_tokens}
    asked |= {"ignore_eos": True, "detokenize": False}
    started = time.monotonic()
    answer = httpx.post(f"{url}/generate", json=asked, timeout=TIMEOUT_SECONDS, trust_env=False)
    answer = answer.raise_for_status().json()
    seconds = time.monotonic() - started
    if answer["finish_reasons"] != ["length"] * num_requests:
        raise EngineError(f"{url} ended completions of a fixed length by {sorted(set(answer['finish_reasons']))}")
    return num_requests * num_tokens / seconds


async def _ask_until_closed(url: str, num_requests: int, max_tokens: int) -> list[Arrivals]:
    """Raises what a request does that fails meanwhile."""
    streams: list[list[Pieces]] = [[] for _ in range(num_requests)]
    every = watched_every(num_requests)
    patience = aiohttp.ClientTimeout(total=None, sock_connect=TIMEOUT_SECONDS, sock_read=TIMEOUT_SECONDS)
    wires = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(url, connector=wires, timeout=patience, raise_for_status=True) as http:
        async with http.get("/v1/models") as response:
            model = (await response.json())["data"][0]["id"]
        asked = {"model": model, "prompt": PROMPT, "ignore_eos": True, "return_token_ids": True}
        tasks = [asyncio.create_task(_until_closed(streams[::every]))]
        for i, seen in enumerate(streams):
            lengths = chain([-(-max_tokens * (i + 1) // num_requests)], repeat(max_tokens))
            tasks.append(asyncio.create_task(_ask(http, asked | {"stream": i % every == 0}, lengths, seen)))
        ended, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        closed = time.monotonic()
        for task in tasks:
            task.result() if task in ended else task.cancel()
    return seen_until(closed, streams[::every])


async def _until_closed(streams: Sequence[Sequence[Pieces]]) -> None:
    """Says "running" once every stream has had its first token."""
    while not all(stream and stream[0] for stream in streams):
        await asyncio.sleep(0.05)
    print("running", flush=True)
    await asyncio.to_thread(sys.stdin.read)


async def _ask(http: aiohttp.ClientSession, asked: Any, lengths: Iterable[int], seen: list[Pieces]) -> None:
    for max_tokens in lengths:
        async with http.post("/v1/completions", json=asked | {"max_tokens": max_tokens}) as response:
            seen.append([])
            async for piece in response.content.iter_any():
                seen[-1].append((time.monotonic(), piece))


def seen_until(closed: float, streams: Sequence[Sequence[Pieces]]) -> list[Arrivals]:
    """Of every request of each stream. The last of a stream waited for its next token until `closed`."""
    found = [[arrivals(pieces) for pieces in stream] for stream in streams]
    for stream in found:
        stream[-1].append((closed, 0))
    return [request for stream in found for request in stream]


def arrivals(pieces: Pieces) -> Arrivals:
    """An event of the stream arrived with the piece that ends it, and has as many tokens as it names."""
    ends = list(accumulate(len(piece) for _, piece in pieces))
    text = b"".join(piece for _, piece in pieces)
    found = ((bisect_left(ends, event.end()), event[1].count(b",") + 1) for event in _TOKENS.finditer(text))
    return [(pieces[i][0], num_tokens) for i, num_tokens in found]


def main() -> int:
    parser = argparse.ArgumentParser(description="Streams completions until its input closes.")
    parser.add_argument("--url", required=True)
    parser.add_argument("--requests", type=int, required=True)
    parser.add_argument("--max-tokens", type=int, default=MAX_TOKENS)
    args = parser.parse_args()
    json.dump(asyncio.run(_ask_until_closed(args.url, args.requests, args.max_tokens)), sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
