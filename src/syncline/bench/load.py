"""Requests that run while something is measured, and the moment each of their tokens arrived.

Its own process, so that reading the streams does not slow what is measured. It asks vLLM's own completion route for
endless random text, `--requests` streams at once, until its standard input closes; then it prints one list of arrival
times a stream (`time.monotonic`, which processes of one host share). With `--turns` it asks several engines in turns
instead, and prints the tokens a second of each one's turns.

    python -m syncline.bench.load --url http://127.0.0.1:8000 --requests 64
"""

import argparse
import asyncio
import itertools
import json
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from statistics import median

import httpx

MAX_TOKENS = 1024
PROMPT = list(range(20, 36))
TIMEOUT_SECONDS = 120.0
WARM_UP_SECONDS = 1.0
TURN_SECONDS = 2.0


@dataclass(slots=True)
class Load:
    """What the streams saw; `arrivals` is filled when the `running` block ends."""

    arrivals: list[list[float]] = field(default_factory=list)

    def tokens_per_second(self, start: float, end: float) -> float:
        return sum(start <= at < end for stream in self.arrivals for at in stream) / (end - start)

    def pauses(self, start: float, end: float) -> list[float]:
        """Of each stream, how much longer than usual its longest wait for a token between `start` and `end` was."""
        found = []
        for stream in self.arrivals:
            gaps = list(itertools.pairwise(stream))
            usual = median([after - before for before, after in gaps] or [0.0])
            seen = [after - before for before, after in gaps if after > start and before < end]
            found.append(max(0.0, max(seen) - usual) if seen else end - start)
        return found


@contextmanager
def running(url: str, num_requests: int, *, max_tokens: int = MAX_TOKENS) -> Iterator[Load]:
    """The block runs while the requests do; afterwards `Load.arrivals` is known."""
    load = Load()
    argv = [*_argv([url], num_requests), "--max-tokens", str(max_tokens)]
    process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        if process.stdout.readline().strip() != "running":
            raise RuntimeError(f"the load on {url} did not start")
        yield load
        printed, _ = process.communicate(timeout=TIMEOUT_SECONDS)
        load.arrivals = json.loads(printed)
    finally:
        process.kill()
        process.wait()


def decode_in_turns(urls: Sequence[str], num_requests: int, *, turns: int) -> list[list[float]]:
    """Tokens a second of each engine, one a turn, first one then the other ahead: what drifts, drifts for both. The
    first turn of each warms up and is left out."""
    argv = [*_argv(urls, num_requests), "--turns", str(turns)]
    done = subprocess.run(argv, stdout=subprocess.PIPE, text=True, check=True, timeout=TIMEOUT_SECONDS)
    return [speeds[1:] for speeds in json.loads(done.stdout)]


def _argv(urls: Sequence[str], num_requests: int) -> list[str]:
    return [sys.executable, "-m", __name__, "--url", *urls, "--requests", str(num_requests)]


async def _take_turns(urls: Sequence[str], num_requests: int, turns: int) -> list[list[float]]:
    speeds: list[list[float]] = [[] for _ in urls]
    for turn in range(turns):
        for i in range(len(urls))[:: 1 if turn % 2 else -1]:
            async with _streams(urls[i], num_requests) as arrivals:
                await asyncio.sleep(WARM_UP_SECONDS)
                start = time.monotonic()
                await asyncio.sleep(TURN_SECONDS)
                speeds[i].append(Load(arrivals).tokens_per_second(start, time.monotonic()))
    return speeds


async def _ask_until_closed(url: str, num_requests: int, max_tokens: int) -> list[list[float]]:
    async with _streams(url, num_requests, max_tokens) as arrivals:
        print("running", flush=True)
        await asyncio.to_thread(sys.stdin.read)
    return arrivals


@asynccontextmanager
async def _streams(url: str, num_requests: int, max_tokens: int = MAX_TOKENS) -> AsyncIterator[list[list[float]]]:
    """When each stream's tokens arrived, from the moment on that every one has had its first."""
    arrivals: list[list[float]] = [[] for _ in range(num_requests)]
    limits = httpx.Limits(max_connections=num_requests)
    async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT_SECONDS, limits=limits) as http:
        model = (await http.get("/v1/models")).json()["data"][0]["id"]
        streams = [asyncio.create_task(_stream(http, model, max_tokens, arrived)) for arrived in arrivals]
        while not all(arrivals):
            await asyncio.sleep(0.05)
            for stream in streams:
                if stream.done():
                    stream.result()
        yield arrivals
        for stream in streams:
            stream.cancel()
        await asyncio.gather(*streams, return_exceptions=True)


async def _stream(http: httpx.AsyncClient, model: str, max_tokens: int, arrived: list[float]) -> None:
    asked = {"model": model, "prompt": PROMPT, "max_tokens": max_tokens, "ignore_eos": True, "stream": True}
    while True:
        async with http.stream("POST", "/v1/completions", json=asked) as response:
            response.raise_for_status()
            async for chunk in response.aiter_raw():
                arrived += [time.monotonic()] * chunk.count(b'"choices"')


def main() -> int:
    parser = argparse.ArgumentParser(description="Streams completions until its input closes.")
    parser.add_argument("--url", nargs="+", required=True)
    parser.add_argument("--requests", type=int, required=True)
    parser.add_argument("--max-tokens", type=int, default=MAX_TOKENS)
    parser.add_argument("--turns", type=int)
    args = parser.parse_args()
    asked = (
        _take_turns(args.url, args.requests, args.turns)
        if args.turns
        else _ask_until_closed(args.url[0], args.requests, args.max_tokens)
    )
    json.dump(asyncio.run(asked), sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
