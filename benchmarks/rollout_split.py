"""GPUs between rollout servers and learner, measured: what either side does a second, and how long it idles.

    python benchmarks/rollout_split.py 1+1 3+1 1x2+2       # engines[x their ranks] + the learner's GPUs
    python benchmarks/rollout_split.py 3+1 --kill                # one engine is killed half way, and comes back
    python benchmarks/rollout_split.py 2+1 --shape tiny --device cpu run.num_steps=6

Each split is one `syncline run` over `broadcast` with sampling one step ahead. While it runs, every engine is asked ten
times a second how many requests it runs; none is idling. The learner idles while it does not learn, so also while a
publish waits for requests to end: `bridge.in_flight=keep` does without. The first two steps are left out of the means.
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
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
import within_deadline
import yaml

from syncline.bench.shapes import SHAPES, make_model

WARM_UP_STEPS = 2
METRICS = "metrics.jsonl"
ENDED = "exit code 0"
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
    """What the engines said while they were asked."""

    num_asked: int = 0
    num_idle: int = 0
    killed_at: int | None = None

    def ask(self, client: httpx.Client, ports: Sequence[int]) -> None:
        for port in ports:
            try:
                text = client.get(f"http://127.0.0.1:{port}/metrics").text
            except httpx.HTTPError:
                continue
            running = re.search(r"^vllm:num_requests_running\{.*\} (\S+)$", text, re.MULTILINE)
            self.num_asked += 1
            self.num_idle += running is not None and float(running[1]) == 0


def main() -> int:
    args = _arguments()
    model = args.folder / args.shape
    if not (model / "config.json").exists():
        make_model(args.shape, model, max_length=4096)
    lines, whole = [], True
    for text in args.splits:
        split = Split.of(text)
        run_dir = args.folder / f"split-{text}"
        (args.folder / "run.yaml").write_text(yaml.safe_dump(_values(args, model, run_dir)))
        overrides = [*(split.overrides() if args.device != "cpu" else split.overrides()[:1]), *args.overrides]
        ended, watch = _run(args, split, run_dir, overrides)
        steps = _steps(run_dir)[WARM_UP_STEPS:]
        whole = whole and ended == ENDED
        line = _line(text, watch, steps) if steps else f"{text:>14}  no step to count"
        lines.append(line if ended == ENDED else f"{line}  ({ended})")
        if ended == within_deadline.INTERRUPTED or time.monotonic() > args.until:
            break
    print("\n" + "".join(f"{title:>14}" for title in COLUMNS))
    print("\n".join(lines))
    return 0 if whole and len(lines) == len(args.splits) else 1


def _run(args: argparse.Namespace, split: Split, run_dir: Path, overrides: list[str]) -> tuple[str, Watch]:
    path = f"{Path(__file__).parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    command = [sys.executable, "-m", "syncline", "run", str(args.folder / "run.yaml"), *overrides, "--overwrite"]
    watch = Watch()
    (run_dir / METRICS).unlink(missing_ok=True)

    def look() -> None:
        steps = _steps(run_dir)
        if len(steps) > WARM_UP_STEPS:
            watch.ask(client, [args.port + i for i in range(split.engines)])
        if args.kill and watch.killed_at is None and len(steps) >= args.steps // 2:
            watch.killed_at = len(steps)
            os.kill(_pid(run_dir, "engine-1" if split.engines > 1 else "engine"), signal.SIGKILL)

    environment = os.environ | {"PYTHONPATH": path}
    with (
        httpx.Client(timeout=2.0, trust_env=False) as client,
        subprocess.Popen(command, env=environment, start_new_session=True) as run,
    ):
        until = min(args.until, time.monotonic() + args.seconds_each)
        why = within_deadline.wait(run, until=until, meanwhile=look)
    return why or f"exit code {run.returncode}", watch


def _pid(run_dir: Path, name: str) -> int:
    processes = json.loads((run_dir / "processes.json").read_text())["processes"]
    return next(entry["pid"] for entry in processes if entry["name"] == name)


def _steps(run_dir: Path) -> list[dict]:
    file = run_dir / METRICS
    lines = file.read_text().splitlines() if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def _line(text: str, watch: Watch, steps: list[dict]) -> str:
    def mean(key: str) -> float:
        return sum(step[key] for step in steps) / len(steps)

    step, tokens = mean("time/step_seconds"), mean("tokens/sampled")
    idle = 100 * watch.num_idle / max(1, watch.num_asked)
    engines = " ".join(str(int(one)) for one in dict.fromkeys(step["sync/engines"] for step in steps))
    cells = [
        text,
        f"{step:.2f} s",
        *(f"{mean(f'time/{part}_seconds'):.2f} s" for part in ("wait", "learn", "sync")),
        f"{tokens / step:.0f}",
        f"{mean('tokens/trained_per_second'):.0f}",
        f"{100 * (1 - mean('time/learn_seconds') / step):.0f} %",
        f"{idle:.0f} %",
        engines,
    ]
    return "".join(f"{cell:>14}" for cell in cells)


def _values(args: argparse.Namespace, model: Path, run_dir: Path) -> dict:
    return {
        "run": {
            "dir": str(run_dir),
            "num_steps": args.steps,
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
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--groups", type=int, default=32)
    parser.add_argument("--max-tokens", type=int, default=512)
    parser.add_argument("--kill", action="store_true", help="kill one engine half way")
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
