"""The trajectory server beside atroposlib's `run-api` on the same traffic: groups a second, latency, memory.

    benchmarks/trajectories.py --run-api PATH/bin/run-api            # 8 x 2048 tokens, 16 clients, one trainer
    benchmarks/trajectories.py --servers ours --tokens 16 --groups 100000     # does memory grow with groups?

Each client posts a group, waits for the answer, posts the next, and pauses while `--ahead` batches are queued; the
trainer takes batches as fast as it can. Bodies are made beforehand, so that the client is not what is measured. On the
Atropos wire they are what `atroposlib`'s client sends (gzip) and the trainer accepts gzip, as `requests` does.
Servers: `theirs`; `ours` (the Atropos wire); `own` (our own wire: permits, groups, leases). Ours have every group on
disk before they answer; theirs keeps none.
"""

import argparse
import asyncio
import gzip
import itertools
import json
import random
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import httpx

from syncline.launch.ports import lease_ports
from syncline.trajectory import wire
from syncline.types import Rollout, RolloutGroup, RolloutStatus, TrainingSample, VersionSpan

JSON = {"Content-Type": "application/json"}
PROMPT_TOKENS = 64
NUM_BODIES = 32
SERVERS = ("theirs", "ours", "own")


@dataclass(frozen=True, slots=True)
class Traffic:
    clients: int
    sequences: int
    tokens: int
    groups: int
    batch_groups: int
    ahead: int

    def __str__(self) -> str:
        return f"{self.groups} groups of {self.sequences} x {self.tokens} tokens, {self.clients} clients, one trainer"


@dataclass(slots=True)
class Seen:
    """What the clients and the trainer saw, and what the server's process used."""

    accepted: int = 0
    served: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    put_seconds: list[float] = field(default_factory=list)
    batch_seconds: list[float] = field(default_factory=list)
    rss: list[int] = field(default_factory=list)
    """Bytes: before the first group, then after every tenth of them."""


class Wire(Protocol):
    """How groups go in and batches come out; `pull` answers with the number of groups."""

    dropped: int
    """Groups that were too old for the trainer when their turn came, known after a pull without a batch."""

    async def begin(self) -> None: ...
    async def push(self, client: int) -> None: ...
    async def pull(self) -> int: ...


class AtroposTraffic:
    dropped = 0

    def __init__(self, http: httpx.AsyncClient, traffic: Traffic) -> None:
        self._http, self._traffic = http, traffic
        self._bodies = itertools.cycle([gzip.compress(scored_data(traffic, seed)) for seed in range(NUM_BODIES)])

    async def begin(self) -> None:
        names = {"wandb_group": "b", "wandb_project": "b", "checkpoint_dir": "b"}
        steps = {"save_checkpoint_interval": 1, "starting_step": 0, "num_steps": 1 << 30}
        sizes = {"batch_size": self._traffic.batch_groups * self._traffic.sequences, "max_token_len": 1 << 20}
        _good(await self._http.post("/register", json=names | steps | sizes))
        await self._http.get("/batch")
        env = {"max_token_length": 4096, "desired_name": "b", "weight": 1.0, "group_size": self._traffic.sequences}
        _good(await self._http.post("/register-env", json=env))

    async def push(self, client: int) -> None:
        headers = JSON | {"Content-Encoding": "gzip"}
        _good(await self._http.post("/scored_data", content=next(self._bodies), headers=headers))

    async def pull(self) -> int:
        return _good(await self._http.get("/batch")).content.count(b'"tokens":')


class OwnTraffic:
    def __init__(self, http: httpx.AsyncClient, traffic: Traffic) -> None:
        self._http, self._traffic = http, traffic
        self._bodies = itertools.cycle([own_group(traffic, seed) for seed in range(NUM_BODIES)])
        self._step = self.dropped = 0

    async def begin(self) -> None:
        await self._post("/start", learner="b", policy_version=0, step=0)

    async def push(self, client: int) -> None:
        ask = {"environment": "even", "worker": str(client), "num_permits": 1, "held": (), "timeout_seconds": 60.0}
        [permit] = (await self._post("/permits", **ask)).json()["permits"]
        body = next(self._bodies).replace(b'"policy_version":0', b'"policy_version":%d' % self._step)
        body = body.replace(b"GROUP", uuid.uuid4().hex.encode(), 1)
        body = body.replace(b'"task_index":0', b'"task_index":%d' % permit["task_index"], 1)
        _good(await self._http.post(f"/groups?permit_id={permit['permit_id']}", content=body, headers=JSON))

    async def pull(self) -> int:
        ask = {"learner": "b", "lease_id": uuid.uuid4().hex, "timeout_seconds": 5.0}
        answer = await self._post("/lease", **ask, num_groups=self._traffic.batch_groups)
        ids = [part[: part.index(b'"')].decode() for part in answer.content.split(b'"group_id":"')[1:]]
        if ids:
            self._step += 1
            await self._post("/acknowledge", learner="b", group_ids=ids, step=self._step, policy_version=self._step)
            await self._post("/commit", learner="b", step=self._step)
        else:
            self.dropped = _good(await self._http.get("/status")).json()["counters"]["stale"]
        return len(ids)

    async def _post(self, path: str, **body: Any) -> httpx.Response:
        return _good(await self._http.post(path, json=body))


def _good(answer: httpx.Response) -> httpx.Response:
    if answer.status_code != 200:
        raise SystemExit(f"{answer.request.url}: {answer.status_code}: {answer.text[:500]}")
    return answer


def sequences(traffic: Traffic, seed: int) -> Iterator[tuple[list[int], list[float]]]:
    """Token ids and logprobs as a float32 sampler gives them, whose 17 digits are what JSON carries."""
    drawn = random.Random(seed)
    for _ in range(traffic.sequences):
        tokens = [drawn.randrange(150_000) for _ in range(traffic.tokens)]
        yield tokens, [-drawn.expovariate(2.0) for _ in tokens]


def scored_data(traffic: Traffic, seed: int) -> bytes:
    prompt = min(PROMPT_TOKENS, traffic.tokens // 2)
    rows = list(sequences(traffic, seed))
    group = {
        "tokens": [tokens for tokens, _ in rows],
        "masks": [[-100] * prompt + tokens[prompt:] for tokens, _ in rows],
        "scores": [float(i % 2) for i in range(len(rows))],
        "inference_logprobs": [[1.0] * prompt + logprobs[prompt:] for _, logprobs in rows],
        "env_id": 0,
    }
    return json.dumps(group).encode()


def own_group(traffic: Traffic, seed: int) -> bytes:
    prompt = min(PROMPT_TOKENS, traffic.tokens // 2)
    rollouts = [
        Rollout(
            samples=(
                TrainingSample(
                    token_ids=tuple(tokens),
                    loss_mask=(False,) * prompt + (True,) * (len(tokens) - prompt),
                    logprobs=(0.0,) * prompt + tuple(logprobs[prompt:]),
                    versions=(VersionSpan(policy_version=0, start=prompt, end=len(tokens)),),
                ),
            ),
            reward=float(i % 2),
            status=RolloutStatus.COMPLETED,
        )
        for i, (tokens, logprobs) in enumerate(sequences(traffic, seed))
    ]
    return wire.encode_group(RolloutGroup("GROUP", "even", 0, tuple(rollouts)))


async def drive(way: Wire, traffic: Traffic, pid: int) -> Seen:
    seen, began, cpu = Seen(rss=[rss_bytes(pid)]), time.perf_counter(), cpu_seconds(pid)
    room = asyncio.Semaphore(traffic.ahead * traffic.batch_groups)
    left = iter(range(traffic.groups))

    async def client(number: int) -> None:
        for _ in left:
            await room.acquire()
            posted = time.perf_counter()
            await way.push(number)
            seen.put_seconds.append(time.perf_counter() - posted)
            seen.accepted += 1
            if seen.accepted % max(1, traffic.groups // 10) == 0:
                seen.rss.append(rss_bytes(pid))

    async def trainer() -> None:
        """Until every group is served, or all are in and those left are less than a batch."""
        while seen.served < traffic.groups:
            asked, all_in, dropped = time.perf_counter(), seen.accepted == traffic.groups, way.dropped
            found = await way.pull()
            for _ in range(found + way.dropped - dropped):
                room.release()
            if found:
                seen.batch_seconds.append(time.perf_counter() - asked)
                seen.served += found
            elif all_in:
                break
            else:
                await asyncio.sleep(0.02)

    await way.begin()
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(trainer())
        for number in range(traffic.clients):
            tasks.create_task(client(number))
    seen.seconds, seen.cpu_seconds = time.perf_counter() - began, cpu_seconds(pid) - cpu
    return seen


async def measure(name: str, url: str, traffic: Traffic, pid: int, *, plain: bool) -> Seen:
    accept = {"Accept-Encoding": "identity" if plain else "gzip"}
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits, headers=accept, trust_env=False) as http:
        return await drive((OwnTraffic if name == "own" else AtroposTraffic)(http, traffic), traffic, pid)


@contextmanager
def running(name: str, traffic: Traffic, run_api: str) -> Iterator[tuple[str, int]]:
    """The server as a process of its own: its address and pid."""
    with tempfile.TemporaryDirectory() as folder, lease_ports({"port": ("127.0.0.1", 0)}) as ports:
        port = str(ports["port"])
        argv = [run_api, "--host", "127.0.0.1"] if name == "theirs" else our_argv(Path(folder), traffic)
        with (Path(folder) / "log").open("w") as log:
            process = subprocess.Popen([*argv, "--port", port], stdout=log, stderr=log)
        try:
            wait_until_ready(f"http://127.0.0.1:{port}", process, Path(folder) / "log")
            yield f"http://127.0.0.1:{port}", process.pid
        finally:
            process.terminate()
            process.wait(60)


def our_argv(folder: Path, traffic: Traffic) -> list[str]:
    fields = {
        "run": {
            "dir": str(folder / "run"),
            "num_steps": 1 << 30,
            "groups_per_step": traffic.batch_groups,
            "rollouts_per_group": traffic.sequences,
            "max_staleness": traffic.ahead,
        },
        "model": {"path": "none"},
        "sampling": {"max_tokens": 1024},
        "environments": [{"task": "none:None", "name": "even"}],
    }
    (folder / "run.yaml").write_text(json.dumps(fields))
    return [sys.executable, "-m", "syncline", "trajectories", str(folder / "run.yaml")]


def wait_until_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        try:
            httpx.get(url, trust_env=False).raise_for_status()
            return
        except httpx.TransportError:
            time.sleep(0.1)
    raise SystemExit(f"{url} did not answer:\n{log.read_text()[-2000:]}")


def rss_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/status").read_text().partition("VmRSS:")[2].split()[0]) << 10


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100


def at(values: list[float], share: float) -> float:
    """The value that `share` of them are at most."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))] if values else float("nan")


def row(name: str, seen: Seen) -> str:
    cells = [
        name,
        f"{seen.accepted / seen.seconds:.1f}",
        f"{seen.served / seen.seconds:.1f}",
        *(f"{1000 * at(seen.put_seconds, share):.0f}" for share in (0.5, 0.99)),
        *(f"{1000 * at(seen.batch_seconds, share):.0f}" for share in (0.5, 0.99)),
        f"{1000 * seen.cpu_seconds / seen.accepted:.1f}",
        f"{seen.rss[0] >> 20} / {max(seen.rss) >> 20} / {seen.rss[-1] >> 20}",
    ]
    return "| " + " | ".join(cells) + " |"


HEAD = (
    "| server | accepted / s | served / s | post p50 ms | p99 | batch p50 ms | p99 | server's CPU ms / group "
    "| RSS MiB: empty / most / at the end |\n|---|---|---|---|---|---|---|---|---|"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--servers", nargs="+", choices=SERVERS, default=SERVERS)
    parser.add_argument("--run-api", default="run-api", help="atroposlib's server")
    parser.add_argument("--groups", type=int, default=400)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--batch-groups", type=int, default=16)
    parser.add_argument("--ahead", type=int, default=4, help="batches that may be queued")
    parser.add_argument("--plain", action="store_true", help="the trainer does not accept gzip")
    args = vars(parser.parse_args())
    servers, run_api, plain = args.pop("servers"), args.pop("run_api"), args.pop("plain")
    traffic = Traffic(**args)
    if traffic.groups % traffic.batch_groups:
        parser.error(f"--groups {traffic.groups} must be whole batches of --batch-groups {traffic.batch_groups}")
    print(f"{traffic}\n\n{HEAD}", flush=True)
    rss = []
    for name in servers:
        with running(name, traffic, run_api) as (url, pid):
            measured = asyncio.run(measure(name, url, traffic, pid, plain=plain))
        rss.append(f"{name}: RSS in MiB, empty and after each tenth: {[size >> 20 for size in measured.rss]}")
        print(row(name, measured), flush=True)
    print("", *rss, sep="\n")


if __name__ == "__main__":
    main()
