"""How fast our engine samples a step's completions, setting by setting, beside TRL's way on the same GPU.

    python benchmarks/sampling.py                                  # 256 completions of 512 tokens after prompts of 128
    python benchmarks/sampling.py --shape qwen2.5-1.5b --only ours 2-engines 4-engines trl
    python benchmarks/sampling.py --shape tiny --device cpu --completions 32 --max-tokens 48 --only ours every-token trl

Engines are `syncline serve`, asked over HTTP by the client that environments use. Ours starts first, then the others at
once; they are measured one after another. Those of `N-engines` sample from one copy of the weights. A step's time is
the whole wait for all completions over the tokens of one; "CPU" is what server, engine core and
worker took of a processor in a step. What is not there by `--seconds` is left out, and said so.
"""

import argparse
import asyncio
import json
import random
import subprocess
import sys
import tempfile
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import httpx
import psutil
from kernels_traced import summary

from syncline.bench.engine import Server, serve
from syncline.bench.shapes import SHAPES, make_model
from syncline.engines.pool import EnginePool
from syncline.errors import EngineError
from syncline.types import SamplingParams

SETTINGS: dict[str, dict] = {
    "ours": {},
    "every-token": {"scheduler_cls": "vllm.v1.core.sched.async_scheduler.AsyncScheduler"},
    "worker-in-core": {"distributed_executor_backend": "uni"},
    "in-turn": {"async_scheduling": False},
    "no-prefix-cache": {"enable_prefix_caching": False},
    "piecewise": {"compilation_config": {"cudagraph_mode": "PIECEWISE"}},
    "no-statistics": {"disable_log_stats": True},
}
"""What differs from how a run starts its engine. `every-token`: vLLM's own scheduler, which holds nothing."""
POOLS = {"2-engines": 2, "4-engines": 4}
START_SHARE = 0.6
"""Of the time: what has not started by then will not be measured."""
GROUP = 8
PROMPT_TOKENS = 128
KV_CACHE_BYTES = 6 << 30
"""Of each engine: 256 sequences of 640 tokens of the 1.5B shape take 4.7 GB."""


@dataclass(slots=True)
class Row:
    name: str
    num_tokens: int = 0
    seconds: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)
    """Seconds of server, engine core and worker in one round, means over engines and rounds."""

    def line(self, steps: int, reference: float | None) -> str:
        took = median(self.seconds)
        ratio = f"{took / reference:.2f} x" if reference else "-"
        cpu = " / ".join(f"{1e3 * one / steps:.2f}" for one in self.processor) or "-"
        cells = (f"{took:.2f} s", f"{self.num_tokens / took:.0f}", f"{1e3 * took / steps:.2f}", ratio, cpu)
        return f"{self.name:<18}" + "".join(f"{cell:>16}" for cell in cells)


class Bench:
    def __init__(self, args: argparse.Namespace) -> None:
        self._args, self._engines = args, list[Server]()
        self._deadline = time.monotonic() + args.seconds
        self._started_by = time.monotonic() + START_SHARE * args.seconds
        self._threads = ThreadPoolExecutor(16)
        self._model = args.folder / args.shape
        if not (self._model / "config.json").exists():
            make_model(args.shape, self._model, max_length=4096)
        letters = random.Random(0)
        num_prompts = args.completions // GROUP
        self._prompts = [[letters.randrange(3, 98) for _ in range(PROMPT_TOKENS)] for _ in range(num_prompts)]
        self.rows: list[Row] = []

    def run(self) -> None:
        wanted = self._args.only
        url = self._ready("ours", self._start("ours", SETTINGS["ours"]))  # the others find its graphs compiled
        if url is None:
            return
        largest = max((POOLS[name] for name in wanted if name in POOLS), default=1)
        starts = {name: self._start(name, SETTINGS[name]) for name in wanted if name in SETTINGS and name != "ours"}
        more = {f"engine-{i}": self._start(f"engine-{i}", {}, attach_to=url) for i in range(1, largest)}
        found = {name: self._ready(name, start) for name, start in (starts | more).items()}
        owner = [url] if "ours" in wanted else []
        pools = {name: [url, *(found[f"engine-{i}"] for i in range(1, size))] for name, size in POOLS.items()
                 if name in wanted}  # fmt: skip
        for name, urls in ({"ours": owner} | {name: [found[name]] for name in starts} | pools).items():
            if urls and None not in urls:
                self._measure(name, [one for one in urls if one])
        if "profile" in wanted:
            self._profile(url)

    def _start(self, name: str, extra: dict, *, attach_to: str | None = None) -> "Future[str]":
        args, options = self._args, ["--attach-to", attach_to] if attach_to else []
        settings: dict = {"device": args.device, "max_num_seqs": args.max_num_seqs, "extra": dict(extra)}
        if args.device == "cuda":
            settings |= {"gpu_memory_utilization": 0.05}  # asked for at the start, whatever the cache's size
            settings["extra"]["kv_cache_memory_bytes"] = KV_CACHE_BYTES
        elif extra.get("scheduler_cls"):  # a CPU schedules in turn
            settings["extra"]["scheduler_cls"] = "vllm.v1.core.sched.scheduler.Scheduler"
        if name == "ours":
            traces = {"profiler": "torch", "torch_profiler_dir": str(self._traces()), "ignore_frontend": True}
            settings["extra"]["profiler_config"] = traces | {"torch_profiler_with_stack": False}
        values = {
            "run": {"dir": str(args.folder / f"run-{name}"), "num_steps": 1, "groups_per_step": 1},
            "model": {"path": str(self._model), "max_length": PROMPT_TOKENS + args.max_tokens},
            "sampling": {"max_tokens": args.max_tokens},
            "environments": [{"task": "arithmetic"}],
            "engine": settings,
            "learner": {"device": args.device},
            "bridge": {"name": "shared"},
        }
        gpus = [0] if args.device == "cuda" else []
        server = serve(values, args.folder / f"{name}.log", *options, gpus=gpus)
        self._engines.append(server)
        return self._threads.submit(self._url, name, server)

    def _url(self, name: str, server: Server) -> str:
        began = time.monotonic()
        try:
            server.wait_until_ready(self._started_by)
        except EngineError:
            server.print_log()
            server.stop()
            raise
        print(f"{name}: ready after {time.monotonic() - began:.0f} s", flush=True)
        return server.url

    def stop(self) -> None:
        """All engines at once."""
        with ThreadPoolExecutor(16) as threads:
            list(threads.map(Server.stop, self._engines))
        self._threads.shutdown()

    def _ready(self, name: str, start: "Future[str]") -> str | None:
        try:
            return start.result(max(0.0, self._started_by - time.monotonic()))
        except Exception as error:  # a variant that does not start must not cost the table
            print(f"{name}: not there ({error!r})", file=sys.stderr, flush=True)
            return None

    def _measure(self, name: str, urls: list[str]) -> None:
        row = Row(name)
        try:
            asyncio.run(self._rounds(row, urls))
        except Exception as error:  # likewise
            print(f"{name}: not measured ({error!r})", file=sys.stderr, flush=True)
        if row.seconds:
            self.rows.append(row)
            print(row.line(self._args.max_tokens, None), flush=True)

    async def _rounds(self, row: Row, urls: list[str]) -> None:
        left = max(1.0, self._deadline - time.monotonic())
        async with EnginePool(urls, timeout_seconds=left, unpublished_version=0) as pool:
            await self._round(pool, min(32, self._args.max_tokens))
            for _ in range(self._args.repeats):
                before, start = processor_seconds(urls), time.perf_counter()
                row.num_tokens = await self._round(pool, self._args.max_tokens)
                row.seconds.append(time.perf_counter() - start)
                used = [b - a for a, b in zip(before, processor_seconds(urls), strict=True)]
                row.processor = [max(new, 0) for new in used]

    async def _round(self, pool: EnginePool, max_tokens: int) -> int:
        asked = SamplingParams(max_tokens=max_tokens)
        work = [pool.generate(prompt, asked, num_completions=GROUP) for prompt in self._prompts]
        found = await asyncio.wait_for(asyncio.gather(*work), max(1.0, self._deadline - time.monotonic()))
        return sum(len(one.token_ids) for group in found for one in group)

    def _profile(self, url: str) -> None:
        """Sixty-four steps, traced."""
        try:
            with httpx.Client(
                base_url=url, timeout=max(1.0, self._deadline - time.monotonic()), trust_env=False
            ) as http:
                http.post("/start_profile").raise_for_status()
                asyncio.run(self._traced(url))
                http.post("/stop_profile").raise_for_status()
            print("\n".join(summary(self._traces())), flush=True)
        except Exception as error:  # likewise
            print(f"profile: none ({error!r})", file=sys.stderr, flush=True)

    async def _traced(self, url: str) -> None:
        async with EnginePool([url], timeout_seconds=60.0, unpublished_version=0) as pool:
            await self._round(pool, min(64, self._args.max_tokens))

    def _traces(self) -> Path:
        folder = self._args.folder / "traces"
        folder.mkdir(parents=True, exist_ok=True)
        return folder.resolve()

    def trl(self) -> None:
        """TRL's way, in a process of its own once the engines have gone."""
        args, left = self._args, self._deadline - time.monotonic()
        file = args.folder / "prompts.json"
        file.write_text(json.dumps([prompt for prompt in self._prompts for _ in range(GROUP)]))
        script = str(Path(__file__).with_name("trl_sampling.py"))
        numbers = [str(args.max_tokens), str(args.repeats), str(args.max_num_seqs), args.device]
        try:
            done = subprocess.run(
                [sys.executable, script, str(self._model), str(file), *numbers],
                stdout=subprocess.PIPE,
                text=True,
                timeout=max(1.0, left),
                check=True,
            )
            self.rows.append(Row("trl", **json.loads(done.stdout.splitlines()[-1])))
        except (subprocess.SubprocessError, ValueError, IndexError) as error:
            print(f"trl: not measured ({error!r})", file=sys.stderr, flush=True)


def processor_seconds(urls: list[str]) -> list[float]:
    """Of the server and of its two busiest processes, core and worker; means over the engines."""
    ports = [url.rpartition(":")[2] for url in urls]
    servers = [p for p in psutil.Process().children(recursive=True) if is_server(p, ports)]
    children = [sorted(map(_used, server.children(recursive=True)), reverse=True) for server in servers]
    busiest = [sum(own[i] for own in children if len(own) > i) for i in range(2)]
    return [seconds / len(urls) for seconds in (sum(map(_used, servers)), *busiest)]


def is_server(process: psutil.Process, ports: list[str]) -> bool:
    try:
        words = process.cmdline()
    except psutil.Error:
        return False
    return "serve" in words and "--port" in words and words[words.index("--port") + 1] in ports


def _used(process: psutil.Process) -> float:
    try:
        times = process.cpu_times()
    except psutil.Error:
        return 0.0
    return times.user + times.system


def main() -> int:
    args = _arguments()
    args.folder.mkdir(parents=True, exist_ok=True)
    bench = Bench(args)
    try:
        bench.run()
    finally:
        bench.stop()
    if "trl" in args.only:
        bench.trl()
    reference = next((median(row.seconds) for row in bench.rows if row.name == "trl"), None)
    print(f"\n{args.shape}, {args.completions} completions of {args.max_tokens} tokens, prompts of {PROMPT_TOKENS}")
    head = ("seconds", "tokens/s", "ms a step", "of TRL's", "CPU ms a step")
    print(f"{'':<18}" + "".join(f"{cell:>16}" for cell in head))
    print("\n".join(row.line(args.max_tokens, reference) for row in bench.rows))
    return 0 if bench.rows else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*SETTINGS, *POOLS, "profile", "trl"]
    parser.add_argument("--shape", choices=sorted(SHAPES), default="qwen2.5-0.5b")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--completions", type=int, default=256, help=f"in groups of {GROUP}")
    parser.add_argument("--max-tokens", type=int, default=512)
    parser.add_argument("--max-num-seqs", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=450.0, help="until everything is measured that will be")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "syncline-sampling")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
