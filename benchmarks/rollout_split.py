"""GPUs between rollout servers and learner, measured: what either side does a second, and how long it idles.

    python benchmarks/rollout_split.py 1+1 3+1 1x2+2       # engines[x their ranks] + the learner's GPUs
    python benchmarks/rollout_split.py 3+1 --kill                # one engine is killed and comes back
    python benchmarks/rollout_split.py 2+1 --shape tiny --device cpu run.num_steps=6

Each split is one `syncline run` over `broadcast` with sampling one step ahead. While it runs, every engine is asked ten
times a second how many requests it runs; none is idling. The learner idles while it does not learn, so also while a
publish waits for requests to end: `bridge.in_flight=keep` does without. The first two steps are left out of the means.
With `--kill` one engine is killed after `--steps` steps, and the run ends as many after all have published again; the
steps before, meanwhile and after are rows of their own.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import within_deadline
import yaml

from syncline.bench.shapes import SHAPES, make_model

WARM_UP_STEPS = 2
METRICS = "metrics.jsonl"
ENDED = "exit code 0"
ENDLESS = 100_000
ALL, LOST, BACK = "", "one lost", "back"
"""What had become of the engines when a step was published."""
COLUMNS = (
    "split",
    "step",
    "wait",
    "learn",
    "sync",
    "sampled/s",
    "trained/s",
    "learner idle",
    "engines idle",
    "engines",
)


@dataclass(frozen=True, slots=True)
class Split:
    engines: int
    ranks: int
    learners: int

    @classmethod
    def of(cls, text: str) -> "Split":
        """`3+1`, `1x2+2`."""
        found = re.fullmatch(r"(\d+)(?:x(\d+))?\+(\d+)", text)
        if not found:
            raise SystemExit(f"{text!r} is no split; write engines[xranks]+learners, such as 3+1 or 1x2+2")
        engines, ranks, learners = found.groups()
        return cls(int(engines), int(ranks or 1), int(learners))

    def overrides(self) -> list[str]:
        size = self.engines * self.ranks
        own = [f"learner.data_parallel_size={self.learners}"] if self.learners > 1 else []
        return [
            f"engine.num_replicas={self.engines}",
            f"engine.tensor_parallel_size={self.ranks}",
            f"engine.devices={list(range(size))}",
            f"learner.devices={list(range(size, size + self.learners))}",
            *own,
        ]


@dataclass(slots=True)
class Watch:
    """What the engines said while they were asked, by what had become of them."""

    num_asked: Counter[str] = field(default_factory=Counter)
    num_idle: Counter[str] = field(default_factory=Counter)
    killed: bool = False

    def ask(self, client: httpx.Client, ports: Sequence[int], when: str) -> None:
        for port in ports:
            try:
                text = client.get(f"http://127.0.0.1:{port}/metrics").text
            except httpx.HTTPError:
                continue
            running = re.search(r"^vllm:num_requests_running\{.*\} (\S+)$", text, re.MULTILINE)
            self.num_asked[when] += 1
            self.num_idle[when] += running is not None and float(running[1]) == 0

    def idle(self, when: str) -> float:
        return self.num_idle[when] / max(1, self.num_asked[when])


def had_become(steps: Sequence[dict], num_engines: int) -> list[str]:
    """Of each step, what had become of the engines when it was published."""
    found, when = list[str](), ALL
    for step in steps:
        whole = step["sync/engines"] == num_engines
        when = when if whole and when != LOST else BACK if whole else LOST
        found.append(when)
    return found


def main() -> int:
    args = _arguments()
    model = args.folder / args.shape
    if not (model / "config.json").exists():
        make_model(args.shape, model, max_length=4096)
    lines, whole, num_done = [], True, 0
    for text in args.splits:
        split = Split.of(text)
        run_dir = args.folder / f"split-{text}"
        (args.folder / "run.yaml").write_text(yaml.safe_dump(_values(args, model, run_dir)))
        overrides = [*(split.overrides() if args.device != "cpu" else split.overrides()[:1]), *args.overrides]
        ended, watch = _run(args, split, run_dir, overrides)
        steps = _steps(run_dir)[WARM_UP_STEPS:]
        whole = whole and ended == ENDED
        when = had_become(steps, split.engines)
        rows = [
            _line(f"{text} {one}", watch.idle(one), [step for step, was in zip(steps, when, strict=True) if was == one])
            for one in dict.fromkeys(when)
        ] or [f"{text:>14}  no step to count"]
        lines += rows if ended == ENDED else [*rows[:-1], f"{rows[-1]}  ({ended})"]
        num_done += 1
        if ended == within_deadline.INTERRUPTED or time.monotonic() > args.until:
            break
    print("\n" + "".join(f"{title:>14}" for title in COLUMNS))
    print("\n".join(lines))
    return 0 if whole and num_done == len(args.splits) else 1


def _run(args: argparse.Namespace, split: Split, run_dir: Path, overrides: list[str]) -> tuple[str, Watch]:
    path = f"{Path(__file__).parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    command = [sys.executable, "-m", "syncline", "run", str(args.folder / "run.yaml"), *overrides, "--overwrite"]
    watch = Watch()
    (run_dir / METRICS).unlink(missing_ok=True)

    def enough() -> bool:
        steps = _steps(run_dir)[WARM_UP_STEPS:]
        when = had_become(steps, split.engines)
        if when:
            watch.ask(client, [args.port + i for i in range(split.engines)], when[-1])
        if args.kill and not watch.killed and len(steps) >= args.steps:
            watch.killed = True
            os.kill(_pid(run_dir, "engine-1" if split.engines > 1 else "engine"), signal.SIGKILL)
        return when.count(BACK) >= args.steps

    environment = os.environ | {"PYTHONPATH": path}
    with (
        httpx.Client(timeout=2.0, trust_env=False) as client,
        subprocess.Popen(command, env=environment, start_new_session=True) as run,
    ):
        until = min(args.until, time.monotonic() + args.seconds_each)
        why = within_deadline.wait(run, until=until, enough=enough)
        done = why is None and run.returncode != 0 and enough()
    return why or (ENDED if done else f"exit code {run.returncode}"), watch


def _pid(run_dir: Path, name: str) -> int:
    processes = json.loads((run_dir / "processes.json").read_text())["processes"]
    return next(entry["pid"] for entry in processes if entry["name"] == name)


def _steps(run_dir: Path) -> list[dict]:
    file = run_dir / METRICS
    lines = file.read_text().splitlines() if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def _line(text: str, idle: float, steps: list[dict]) -> str:
    def mean(key: str) -> float:
        return sum(step[key] for step in steps) / len(steps)

    step, tokens = mean("time/step_seconds"), mean("tokens/sampled")
    engines = " ".join(str(int(one)) for one in dict.fromkeys(step["sync/engines"] for step in steps))
    cells = [
        text,
        f"{step:.2f} s",
        *(f"{mean(f'time/{part}_seconds'):.2f} s" for part in ("wait", "learn", "sync")),
        f"{tokens / step:.0f}",
        f"{mean('tokens/trained_per_second'):.0f}",
        f"{100 * (1 - mean('time/learn_seconds') / step):.0f} %",
        f"{100 * idle:.0f} %",
        engines,
    ]
    return "".join(f"{cell:>14}" for cell in cells)


def _values(args: argparse.Namespace, model: Path, run_dir: Path) -> dict:
    return {
        "run": {
            "dir": str(run_dir),
            "num_steps": ENDLESS if args.kill else args.steps,
            "groups_per_step": args.groups,
            "rollouts_per_group": 8,
            "max_staleness": 1,
        },
        "model": {"path": str(model), "max_length": 2048},
        "sampling": {"max_tokens": args.max_tokens},
        "environments": [{"task": "even_tokens:EvenTokens"}],
        "engine": {"device": args.device, "port": args.port, "max_num_seqs": 512, "gpu_memory_utilization": 0.85},
        "learner": {"device": args.device, "token_budget": 16384, "checkpoint_interval": 1000},
        "bridge": {"name": "broadcast", "min_engines": 1},
        "parity": {"interval": 0, "prompts": ["2 + 2 ="]},
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("splits", nargs="+", metavar="E[xT]+L | a.b=c", help="splits, then fields over the benchmark's")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="qwen2.5-0.5b")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--steps", type=int, default=12, help="with --kill: before it, and again after")
    parser.add_argument("--groups", type=int, default=32)
    parser.add_argument("--max-tokens", type=int, default=512)
    parser.add_argument("--kill", action="store_true", help="kill one engine, which comes back")
    parser.add_argument("--port", type=int, default=8080, help="of the first engine; the others' follow")
    parser.add_argument("--seconds-each", type=float, default=600.0, help="at most, of one split")
    parser.add_argument("--deadline", type=float, default=3600.0, help="seconds until the table of what is known then")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "syncline-rollout-split")
    args = parser.parse_intermixed_args()
    args.until = time.monotonic() + args.deadline
    args.overrides = [word for word in args.splits if "=" in word]
    args.splits = [word for word in args.splits if "=" not in word]
    args.folder.mkdir(parents=True, exist_ok=True)
    return args


if __name__ == "__main__":
    sys.exit(main())
