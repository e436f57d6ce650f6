"""The learner's speed and memory beside TRL's GRPO loss (with liger, where installed) and the matrix products' limit.

    python benchmarks/learner.py --shape qwen2.5-1.5b --deadline 240

One device. A contender that fails or takes too long costs its own row, and the table comes by the deadline. A CPU does
the shape `tiny`.
"""

import argparse
import gc
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from learning import LOSS, Load, Reading, matmul_rate, ours, table

from syncline.bench.apart import Outcome, process_start, take, watch
from syncline.bench.shapes import SHAPES
from syncline.config.schema import Learner, Recomputation

RATE = "matrix products"
OURS = {
    "everything kept": "none",
    "products kept": "selective",
    "attention kept": "attention",
    "layers recomputed": "full",
}
TRLS = {
    "everything kept": (False, True),
    "layers recomputed": (True, True),
    "kept, loss alone": (False, False),
    "recomputed, loss alone": (True, False),
}
"""Recomputed, scored first."""


def main() -> int:
    args = _arguments()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    contenders = _contenders(args, device)
    if args.take:
        take(dict(chain(*(group.items() for group in contenders))), args.take, args.told, (torch.OutOfMemoryError,))
        return 0
    outcome = Outcome()
    with tempfile.TemporaryDirectory() as folder:
        told = Path(folder) / "told.jsonl"
        for names in filter(None, map(list, contenders)):
            watch(
                names,
                lambda left: [sys.executable, *sys.argv, "--told", str(told), "--take", json.dumps(left)],
                told,
                outcome=outcome,
                seconds_each=args.seconds_each,
                deadline=process_start() + args.deadline,
            )
    rate = outcome.results.pop(RATE, {"rate": float("nan")})["rate"]
    readings = [Reading(**result) for result in outcome.results.values()]
    print("\n".join(["", *table(readings, rate, _device_name(device))]))
    print("\n".join(["", *(f"{name}: {fault}" for name, fault in outcome.faults.items())]) if outcome.faults else "")
    if args.json:
        args.json.write_text(json.dumps({"matmul_rate": rate, "readings": [asdict(reading) for reading in readings]}))
    return 0


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name() if device.type == "cuda" else "CPU"


def _contenders(args: argparse.Namespace, device: torch.device) -> list[dict[str, Callable[[], dict[str, Any]]]]:
    """By process, what matters most first: liger stays in transformers' modules for the rest of its process."""
    cases = [(shape, load) for load in _loads(args) for shape in args.shape]

    def measured(contender: Any, whats: Sequence[str]) -> dict[str, Any]:
        found = ((case, contender(args, *case, device, what)) for what in whats for case in cases)
        return {
            f"{shape}, {load.name}, {name}": partial(_freed, measure, device)
            for (shape, load), (name, measure) in found
        }

    first: dict[str, Any] = {RATE: lambda: {"rate": matmul_rate(device)}}
    rivals = [] if args.no_trl or find_spec("trl") is None else list(TRLS)
    kept, recomputed = list(OURS)[:2], list(OURS)[2:]
    return [first | measured(_ours, kept), measured(_trl, rivals), measured(_ours, recomputed)]


def _freed(measure: Callable[[], Reading], device: torch.device) -> dict[str, Any]:
    try:
        reading = measure()
        print(f"{reading.name}: {reading.tokens_per_second:.0f} tokens/s", flush=True)
        return asdict(reading)
    finally:
        gc.collect()  # compiled layers refer to themselves
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Forward and backward passes of the learner.")
    parser.add_argument("--shape", action="append", choices=sorted(SHAPES), required=True)
    parser.add_argument("--load", action="append", choices=("equal", "mixed"), help="default: both")
    parser.add_argument("--rollouts", type=int, default=64)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--completion", type=int, default=512, help="of equal lengths")
    parser.add_argument("--shortest", type=int, default=128, help="completion of mixed lengths")
    parser.add_argument("--longest", type=int, default=3968, help="completion of mixed lengths")
    parser.add_argument("--token-budget", type=int, default=16384)
    parser.add_argument("--chunk", type=int, default=1024, help="learner.logprob_chunk_tokens")
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--passes", type=int, default=1, help="measured, after one that compiles")
    parser.add_argument("--no-trl", action="store_true", help="leave TRL out even where it is installed")
    parser.add_argument("--deadline", type=float, default=540.0, help="seconds until the table of what is known then")
    parser.add_argument("--seconds-each", type=float, default=150.0, help="at most, of one contender")
    parser.add_argument("--json", type=Path, help="write every number there too")
    parser.add_argument("--take", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--told", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.load = args.load or ["equal", "mixed"]
    return args


def _loads(args: argparse.Namespace) -> list[Load]:
    sizes = {"prompt": args.prompt, "num_rollouts": args.rollouts, "rollouts_per_group": args.group}
    made = {
        "equal": Load.equal(completion=args.completion, **sizes),
        "mixed": Load.mixed(bounds=(args.shortest, args.longest), **sizes),
    }
    return [made[name] for name in args.load]


Found = tuple[str, Callable[[], Reading]]


def _ours(args: argparse.Namespace, shape: str, load: Load, device: torch.device, what: str) -> Found:
    running = Learner(
        loss=LOSS,
        token_budget=args.token_budget,
        logprob_chunk_tokens=args.chunk,
        attention=args.attention,
        recomputation=Recomputation.model_validate({"what": OURS[what]}),
    )
    name = f"ours, {what}"
    return name, partial(ours, shape, load, name=name, running=running, device=device, passes=args.passes)


def _trl(args: argparse.Namespace, shape: str, load: Load, device: torch.device, what: str) -> Found:
    from trl_loss import Settings, trl

    liger = device.type == "cuda" and find_spec("liger_kernel") is not None
    rows = args.token_budget // (load.prompt + max(load.completions))
    name, (recompute, old) = f"TRL{' + liger' if liger else ''}, {what}", TRLS[what]
    settings = Settings(rows, recompute, old, liger)
    return name, partial(trl, shape, load, settings, name=name, device=device, passes=args.passes)


if __name__ == "__main__":
    sys.exit(main())
