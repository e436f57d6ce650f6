"""Seconds until every engine of a run answers, as `syncline serve` starts them: a table, by the deadline at the latest.

    python benchmarks/engines_start.py --shape qwen2.5-0.5b --engines 2 --deadline 480       # one copy, on one GPU
    python benchmarks/engines_start.py --model MODEL/ --engines 2 --bridge restart           # a copy each

vLLM's caches of compiled graphs count where they are warm; `VLLM_CACHE_ROOT=$(mktemp -d)` begins without. The seconds
are those that the supervisor tells, from the first process's start to each engine's first answer.
"""

import argparse
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml
from within_deadline import wait

from syncline.bench.shapes import SHAPES, make_model
from syncline.observe.files import last_lines

MAX_LENGTH = 1024
STARTED, READY = (re.compile(rf"supervisor +\| {what}") for what in (r"started (\S+) ", r"(\S+) is ready after"))


def main() -> int:
    args = parsed()
    until = time.monotonic() + args.deadline
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = args.model or make_model(args.shape, folder / "model", max_length=MAX_LENGTH)
        (folder / "run.yaml").write_text(yaml.safe_dump(values(args, model, folder)))
        seen, why = measured(folder, num_engines=args.engines, until=until)
        print(f"| {args.engines} engines, {args.bridge} | started, s | ready, s |\n|---|---|---|")
        for engine, (started, ready) in seen.items():
            print(f"| {engine} | {started:.1f} | {'-' if ready is None else f'{ready:.1f}'} |")
        if why:
            print(f"{why}; what was said last:", *last_lines(folder / "said", 20), sep="\n  ")
    return int(why is not None)


def measured(
    folder: Path, *, num_engines: int, until: float
) -> tuple[dict[str, tuple[float, float | None]], str | None]:
    """Engine → when it was started and when it was ready; and why not all of them are."""
    seen: dict[str, tuple[float, float | None]] = {}
    began = time.monotonic()
    with (folder / "said").open("w") as said, (folder / "said").open() as heard:
        argv = [sys.executable, "-u", "-m", "syncline", "serve", str(folder / "run.yaml")]
        run = subprocess.Popen(argv, stdout=said)

        def all_ready() -> bool:
            return len([ready for _, ready in seen.values() if ready is not None]) == num_engines

        def heard_of_all() -> bool:
            for line in heard:
                if match := STARTED.match(line):
                    seen[match[1]] = (time.monotonic() - began, None)
                elif match := READY.match(line):
                    seen[match[1]] = (seen[match[1]][0], time.monotonic() - began)
            return all_ready()

        why = wait(run, until=until, enough=heard_of_all)
    return seen, None if all_ready() else why or f"syncline serve ended with {run.returncode}"


def values(args: argparse.Namespace, model: Path, folder: Path) -> dict:
    return {
        "run": {"dir": str(folder / "run"), "num_steps": 1, "groups_per_step": 1},
        "model": {"path": str(model), "max_length": MAX_LENGTH},
        "sampling": {"max_tokens": 8},
        "environments": [{"task": "arithmetic"}],
        "engine": {"num_replicas": args.engines, "gpu_memory_utilization": 0.8 / args.engines},
        "bridge": {"name": args.bridge},
    }


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--model", type=Path)
    which.add_argument("--shape", choices=SHAPES, help="random weights")
    parser.add_argument("--engines", type=int, default=2)
    parser.add_argument("--bridge", default="shared", choices=("shared", "restart"))
    parser.add_argument("--deadline", type=float, default=480.0, metavar="SECONDS")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
