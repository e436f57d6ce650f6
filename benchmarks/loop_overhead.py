"""Where a step's time goes that is neither sampling nor learning: every part of the main loop but engine and model.

    python benchmarks/loop_overhead.py                        # 32 groups of 8 completions of 512 tokens
    python benchmarks/loop_overhead.py --groups 8 --rollouts 8 --max-tokens 64 --steps 20

The trajectory server and the environment worker are a run's own, each a process; this process is the learner up to
packed micro-batches, and acknowledges at once. The engine is a stand-in that answers all of a step's requests at the
same moment, with what a real one would say. The table tells, from that moment on, when the median step had each part
done, and the processor time each process took for it. Ratios mean something on any machine.
"""

import argparse
import asyncio
import json
import os
import random
import struct
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from even_tokens import EvenTokens
from trajectories import cpu_seconds, wait_until_ready

from syncline.bench.shapes import tokenizer
from syncline.config.schema import Loss
from syncline.engines.pool import EnginePool
from syncline.envs.rendering import ChatPolicy
from syncline.envs.worker import EnvironmentWorker
from syncline.launch.ports import lease_ports
from syncline.learner.advantages import group_advantages
from syncline.learner.packing import pack
from syncline.learner.telemetry import staleness
from syncline.learner.versions import refuse_unproved
from syncline.protocols import Permit
from syncline.trajectory.client import TrajectorySink, TrajectorySource
from syncline.types import Completion, RolloutGroup, SamplingParams

WARM_UP_STEPS = 3
Moment = tuple[str, int, float]
"""What happened, in which step, when (`time.monotonic`, which processes of one machine share)."""
ROWS = (
    ("answered", "engine has written all answers"),
    ("parsed", "worker has read the last of them"),
    ("put", "worker has the last group ready"),
    ("accepted", "last group on disk, worker told so"),
    ("fetched", "learner has the batch"),
    ("packed", "first micro-batch made"),
    ("acknowledged", "server told that they were used"),
    ("asked", "engine has all requests of the next step"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", type=int, default=32)
    parser.add_argument("--rollouts", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=512)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--role", choices=("learner", "engine", "worker"), default="learner", help=argparse.SUPPRESS)
    parser.add_argument("--engine-port", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--trajectories-port", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.role == "learner":
        Bench(args).run()
    else:
        for moment in asyncio.run({"engine": engine, "worker": worker}[args.role](args)):
            print(*moment)


async def engine(args: argparse.Namespace) -> list[Moment]:
    """Answers once all of a step's groups are asked for; ends when the steps do. Step 3 is sampled under version 3."""
    from aiohttp import web

    bodies = [answer(args, seed) for seed in range(args.groups)]
    moments: list[Moment] = []
    waiting: list[asyncio.Future[int]] = []
    told: list[float] = []
    over = asyncio.Event()

    async def generate(request: web.Request) -> web.StreamResponse:
        await request.read()
        mine: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        waiting.append(mine)
        step, place = len(told) // args.groups, len(waiting) - 1
        if len(waiting) == args.groups:
            moments.append(("asked", step, time.monotonic()))
            asyncio.get_running_loop().call_later(0.2, answer_all, step)
        response = web.Response(body=bodies[place].replace(b"VERSION", b"%d" % await mine))
        await response.prepare(request)
        await response.write_eof()
        told.append(time.monotonic())
        if len(told) % args.groups == 0:
            moments.append(("answered", step, told[-1]))
        if len(told) == args.groups * args.steps:
            over.set()
        return response

    def answer_all(step: int) -> None:
        moments.append(("begun", step, time.monotonic()))
        for one in waiting:
            one.set_result(step)
        waiting.clear()

    app = web.Application()
    app.router.add_post("/syncline/generate", generate)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", args.engine_port).start()
    await over.wait()
    await runner.cleanup()
    return moments


def answer(args: argparse.Namespace, seed: int) -> bytes:
    """What `/syncline/generate` says, with a place for the version."""
    drawn = random.Random(seed)
    single = struct.Struct("f")

    def completion() -> dict[str, Any]:
        logprobs = [single.unpack(single.pack(-drawn.expovariate(0.3)))[0] for _ in range(args.max_tokens)]
        token_ids = [drawn.randrange(150_000) for _ in logprobs]
        spans = [["VERSION", 0, args.max_tokens]]
        return {"token_ids": token_ids, "logprobs": logprobs, "versions": spans, "finish_reason": "length"}

    found = {"completions": [completion() for _ in range(args.rollouts)]}
    return json.dumps(found, separators=(",", ":")).replace('"VERSION"', "VERSION").encode()


async def worker(args: argparse.Namespace) -> list[Moment]:
    """A run's own parts, their calls timed, until SIGTERM."""
    moments: list[Moment] = []

    def note(what: str, versions: Sequence[Any]) -> None:
        moments.append((what, versions[0].policy_version, time.monotonic()))

    class Policy(ChatPolicy):
        async def sample(self, *given: Any, **options: Any) -> list[Completion]:
            found = await super().sample(*given, **options)
            note("parsed", found[0].versions)
            return found

    class Sink(TrajectorySink):
        async def put(self, group: RolloutGroup, permit: Permit) -> None:
            versions = group.rollouts[0].samples[0].versions
            note("put", versions)
            await super().put(group, permit)
            note("accepted", versions)

    sampling = SamplingParams(args.max_tokens)
    async with (
        EnginePool([f"http://127.0.0.1:{args.engine_port}"], timeout_seconds=600) as pool,
        Sink(f"http://127.0.0.1:{args.trajectories_port}") as sink,
    ):
        policy = Policy(tokenizer(), pool, sampling, max_length=1 << 20)
        sizes = {"rollouts_per_group": args.rollouts, "concurrency": 64, "group_timeout_seconds": 600}
        environment = EvenTokens(args.prompt_tokens)
        await EnvironmentWorker(environment, policy, sink=sink, name="even", **sizes).run_until_signal()
    return moments


class Bench:
    """The learner."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        self._moments: list[Moment] = []
        self._cpu: dict[str, float] = {}

    def run(self) -> None:
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            names = ("engine", "trajectories")
            ports = stack.enter_context(lease_ports(dict.fromkeys(names, ("127.0.0.1", 0))))
            (folder / "run.yaml").write_text(json.dumps(self._fields(folder)))
            serve = ["-m", "syncline", "trajectories", str(folder / "run.yaml"), "--port", str(ports["trajectories"])]
            server = stack.enter_context(running("trajectories", serve, folder))
            url = f"http://127.0.0.1:{ports['trajectories']}"
            wait_until_ready(url, server, folder / "trajectories")
            own = [__file__, *sys.argv[1:], "--engine-port", str(ports["engine"])]
            own += ["--trajectories-port", str(ports["trajectories"]), "--role"]
            processes = {
                name: stack.enter_context(running(name, [*own, name], folder)) for name in ("engine", "worker")
            }
            self._learn(url, {"server": server, **processes})
            for process in processes.values():
                process.terminate()
                process.wait(60)
            for name in processes:
                self._moments += list(read(folder / name))
        self._print()

    def _fields(self, folder: Path) -> dict[str, Any]:
        args = self._args
        sizes = {"num_steps": args.steps, "groups_per_step": args.groups, "rollouts_per_group": args.rollouts}
        return {
            "run": {"dir": str(folder / "run"), **sizes},
            "model": {"path": "none"},
            "sampling": {"max_tokens": args.max_tokens},
            "environments": [{"task": "none:None", "name": "even"}],
        }

    def _learn(self, url: str, processes: dict[str, "subprocess.Popen[bytes]"]) -> None:
        args, began = self._args, {}
        with TrajectorySource(url) as source:
            source.start(policy_version=0, step=0)
            for step in range(args.steps):
                if step == WARM_UP_STEPS:
                    began = spent(processes)
                groups = source.next_batch(args.groups)
                self._note("fetched", step)
                refuse_unproved(groups, proved=step)
                staleness(groups, policy_version=step)
                budget = 16 * (args.prompt_tokens + args.max_tokens)
                advantages = group_advantages(groups, "group")
                batches = pack(
                    groups, advantages, token_budget=budget, loss=Loss(), max_completion_tokens=args.max_tokens
                )
                _ = batches[0]
                self._note("packed", step)
                source.acknowledge(groups, step=step + 1, policy_version=step + 1)
                self._note("acknowledged", step)
                source.metrics()
        ended = spent(processes)
        self._cpu = {name: (ended[name] - began[name]) / (args.steps - WARM_UP_STEPS) for name in began}

    def _note(self, what: str, step: int) -> None:
        self._moments.append((what, step, time.monotonic()))

    def _print(self) -> None:
        last: dict[tuple[str, int], float] = defaultdict(float)
        for what, step, when in self._moments:
            last[what, step] = max(last[what, step], when)
        steps = range(WARM_UP_STEPS, self._args.steps - 1)
        before = 0.0
        print("| since the engine began to answer | ms | more |\n|---|---|---|")
        for what, title in ROWS:
            later = what == "asked"
            since = 1e3 * median(last[what, step + later] - last["begun", step] for step in steps)
            print(f"| {title} | {since:.0f} | {since - before:.0f} |")
            before = since
        print("\nprocessor, ms a step: " + ", ".join(f"{name} {1e3 * one:.0f}" for name, one in self._cpu.items()))


def spent(processes: dict[str, "subprocess.Popen[bytes]"]) -> dict[str, float]:
    return {"learner": time.process_time()} | {name: cpu_seconds(one.pid) for name, one in processes.items()}


def read(path: Path) -> Iterator[Moment]:
    for line in path.read_text().splitlines():
        what, step, when = line.split()
        yield what, int(step), float(when)


@contextmanager
def running(name: str, argv: list[str], folder: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """Its standard output in the file of its name."""
    with (folder / name).open("w") as out:
        process = subprocess.Popen([sys.executable, *argv], stdout=out, env=os.environ)
        try:
            yield process
        finally:
            process.terminate()
            process.wait(60)


if __name__ == "__main__":
    main()
