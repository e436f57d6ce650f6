"""What a request costs the process that asks: `EngineClient` beside aiohttp and httpx alone, in one run.

    python benchmarks/client_cost.py                          # 512 in flight, answers of 256 tokens
    python benchmarks/client_cost.py --httpx-pools 8 64 512

The engine's stand-in is a process of its own and answers every request as `/syncline/generate` does, after `--seconds`.
Told is the processor time of this process, its threads included, for each request once all connections are open: the
least and the most of `--repeats`. `EngineClient` makes types of the answer; the others read its bytes and no more.
"""

import argparse
import asyncio
import json
import random
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, contextmanager
from functools import partial

import aiohttp
import httpx
from aiohttp import web

from syncline.engines.client import EngineClient
from syncline.types import SamplingParams

ROUTE = "/syncline/generate"
PROMPT = tuple(range(1000, 1128))
TIMEOUT_SECONDS = 60.0
HEADERS = {"Content-Type": "application/json"}

Ask = Callable[[int], Awaitable[object]]
"""Of the request's place among those in flight."""


def answer(num_tokens: int) -> bytes:
    """As the engine's; its logprobs are 32-bit floats, which have many digits as 64-bit ones."""
    token_ids = [random.randrange(150_000) for _ in range(num_tokens)]
    logprobs = [-random.expovariate(1.0) for _ in range(num_tokens)]
    completion = {"token_ids": token_ids, "logprobs": logprobs, "versions": [[3, 0, num_tokens]]}
    return json.dumps({"completions": [completion | {"finish_reason": "length"}]}, separators=(",", ":")).encode()


def serve(num_tokens: int, seconds: float) -> None:
    """Prints its port, and answers until it is ended."""
    body = answer(num_tokens)

    async def generate(request: web.Request) -> web.Response:
        await request.read()
        await asyncio.sleep(seconds)
        return web.Response(body=body, content_type="application/json")

    app = web.Application()
    app.router.add_post(ROUTE, generate)
    listening = socket.create_server(("127.0.0.1", 0), backlog=4096)
    print(listening.getsockname()[1], flush=True)
    web.run_app(app, sock=listening, print=None, access_log=None)


@contextmanager
def stand_in(num_tokens: int, seconds: float) -> Iterator[str]:
    command = [sys.executable, __file__, "--serve", "--tokens", str(num_tokens), "--seconds", str(seconds)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield f"http://127.0.0.1:{int(process.stdout.readline())}"
        finally:
            process.terminate()


@asynccontextmanager
async def by_engine_client(url: str, in_flight: int) -> AsyncIterator[Ask]:
    sampling = SamplingParams(max_tokens=256)
    async with EngineClient(url, timeout_seconds=TIMEOUT_SECONDS, max_connections=in_flight) as client:
        yield lambda _: client.generate(PROMPT, sampling)


@asynccontextmanager
async def by_aiohttp(url: str, in_flight: int, *, trust_env: bool) -> AsyncIterator[Ask]:
    connector, body = aiohttp.TCPConnector(limit=in_flight), json.dumps({"prompt_token_ids": PROMPT}).encode()
    async with aiohttp.ClientSession(url, connector=connector, headers=HEADERS, trust_env=trust_env) as http:

        async def ask(_: int) -> object:
            async with http.post(ROUTE, data=body) as response:
                return await response.read()

        yield ask


@asynccontextmanager
async def by_httpx(url: str, in_flight: int, *, pool: int) -> AsyncIterator[Ask]:
    limits, body = httpx.Limits(max_connections=pool), json.dumps({"prompt_token_ids": PROMPT}).encode()
    async with AsyncExitStack() as stack:
        clients = [
            httpx.AsyncClient(base_url=url, limits=limits, headers=HEADERS, timeout=TIMEOUT_SECONDS)
            for _ in range(-(-in_flight // pool))
        ]
        for client in clients:
            await stack.enter_async_context(client)
        yield lambda i: clients[i % len(clients)].post(ROUTE, content=body)


async def cpu_milliseconds(asking: AbstractAsyncContextManager[Ask], in_flight: int, rounds: int) -> float:
    """Of one request, the first of each connection left out."""
    async with asking as ask:

        async def ask_in_turn(i: int, times: int) -> None:
            for _ in range(times):
                await ask(i)

        for times in (1, rounds):
            started = time.process_time()
            await asyncio.gather(*(ask_in_turn(i, times) for i in range(in_flight)))
        return 1e3 * (time.process_time() - started) / (in_flight * rounds)


def measured(args: argparse.Namespace, url: str) -> dict[str, list[float]]:
    ways: dict[str, Callable[..., AbstractAsyncContextManager[Ask]]] = {
        "EngineClient": by_engine_client,
        "aiohttp": partial(by_aiohttp, trust_env=False),
        "aiohttp, looking for proxies": partial(by_aiohttp, trust_env=True),
    }
    ways |= {f"httpx, pools of {pool}": partial(by_httpx, pool=pool) for pool in args.httpx_pools}
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(args.repeats):
        for name, way in ways.items():
            found[name].append(asyncio.run(cpu_milliseconds(way(url, args.in_flight), args.in_flight, args.rounds)))
    return found


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Processor time of a request, on the client's side.")
    parser.add_argument("--in-flight", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=256, help="of an answer")
    parser.add_argument("--seconds", type=float, default=0.5, help="until an answer comes")
    parser.add_argument("--rounds", type=int, default=8, help="requests of each connection that count")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--httpx-pools", type=int, nargs="+", default=[8], help="connections of a pool")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(words)
    if args.serve:
        serve(args.tokens, args.seconds)
        return 0
    with stand_in(args.tokens, args.seconds) as url:
        found = measured(args, url)
    print(f"\n{args.in_flight} in flight, answers of {args.tokens} tokens: processor time of a request, ms\n")
    print("| client | least | most |\n|---|---|---|")
    for name, times in found.items():
        print(f"| {name} | {min(times):.2f} | {max(times):.2f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
