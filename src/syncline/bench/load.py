"""Requests that run while something is measured, and the moment each of their tokens arrived.

Its own process, so that reading the streams does not slow what is measured. It asks vLLM's own completion route for
endless random text, `--requests` streams at once, until its standard input closes; then it prints one list of arrival
times a stream (`time.monotonic`, which processes of one host share).

    python -m syncline.bench.load --url http://127.0.0.1:8000 --requests 64
"""

import argparse
import asyncio
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median

import httpx

MAX_TOKENS = 1024
PROMPT = list(range(20, 36))
TIMEOUT_SECONDS = 120.0


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
def running(url: str, num_requests: int) -> Iterator[Load]:
    """The block runs while the requests do; afterwards `Load.arrivals` is known."""
    load = Load()
    argv = [sys.executable, "-m", __name__, "--url", url, "--requests", str(num_requests)]
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


async def _ask_until_closed(url: str, num_requests: int) -> list[list[float]]:
    arrivals: list[list[float]] = [[] for _ in range(num_requests)]
    limits = httpx.Limits(max_connections=num_requests)
    async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT_SECONDS, limits=limits) as http:
        model = (await http.get("/v1/models")).json()["data"][0]["id"]
        streams = [asyncio.create_task(_stream(http, model, arrived)) for arrived in arrivals]
        while not all(arrivals):
            await asyncio.sleep(0.05)
            for stream in streams:
                if stream.done():
                    stream.result()
        print("running", flush=True)
        await asyncio.to_thread(sys.stdin.read)
        for stream in streams:
            stream.cancel()
        await asyncio.gather(*streams, return_exceptions=True)
    return arrivals


async def _stream(http: httpx.AsyncClient, model: str, arrived: list[float]) -> None:
    asked = {"model": model, "prompt": PROMPT, "max_tokens": MAX_TOKENS, "ignore_eos": True, "stream": True}
    while True:
        async with http.stream("POST", "/v1/completions", json=asked) as response:
            response.raise_for_status()
            async for chunk in response.aiter_raw():
                arrived += [time.monotonic()] * chunk.count(b'"choices"')


def main() -> int:
    parser = argparse.ArgumentParser(description="Streams completions until its input closes.")
    parser.add_argument("--url", required=True)
    parser.add_argument("--requests", type=int, required=True)
    args = parser.parse_args()
    json.dump(asyncio.run(_ask_until_closed(args.url, args.requests)), sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
