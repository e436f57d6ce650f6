"""The learner's speed and memory beside TRL's GRPO loss (with liger, where installed) and the matrix products' limit.

    python benchmarks/learner.py --shape qwen2.5-1.5b

One process, one device. A CPU does the shape `tiny`.
"""

import argparse
import gc
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

import torch

from syncline.bench.learning import LOSS, Load, Reading, matmul_rate, ours, table
from syncline.bench.shapes import SHAPES
from syncline.config.schema import Learner, Recomputation


def main() -> int:
    args = _arguments()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rate, readings = matmul_rate(device), []
    cases = [(shape, load) for shape in args.shape for load in _loads(args)]
    # TRL last: liger stays in transformers' modules for the rest of the process
    for contenders in (_ours, _trl):
        for shape, load in cases:
            for name, measure in contenders(args, shape, load, device).items():
                reading = _tried(name, measure, device)
                if reading:
                    readings.append(reading)
                    print(f"{shape}, {load.name}, {name}: {reading.tokens_per_second:.0f} tokens/s", flush=True)
    where = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print("\n".join(["", *table(readings, rate, where)]))
    if args.json:
        args.json.write_text(json.dumps({"matmul_rate": rate, "readings": [asdict(reading) for reading in readings]}))
    return 0


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
    parser.add_argument("--token-budget", type=int, default=10240)
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--passes", type=int, default=2)
    parser.add_argument("--no-trl", action="store_true", help="leave TRL out even where it is installed")
    parser.add_argument("--json", type=Path, help="write every number there too")
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


def _ours(args: argparse.Namespace, shape: str, load: Load, device: torch.device) -> dict[str, Callable[[], Reading]]:
    found: dict[str, Callable[[], Reading]] = {}
    for kept, what in (("everything kept", "none"), ("layers recomputed", "full")):
        running = Learner(
            loss=LOSS,
            token_budget=args.token_budget,
            attention=args.attention,
            recomputation=Recomputation(what=what),  # pyright: ignore[reportArgumentType]
        )
        name = f"ours, {kept}"
        found[name] = lambda name=name, running=running: ours(
            shape, load, name=name, running=running, device=device, passes=args.passes
        )
    return found


def _trl(args: argparse.Namespace, shape: str, load: Load, device: torch.device) -> dict[str, Callable[[], Reading]]:
    from syncline.bench.trl_loss import Settings, trl

    found: dict[str, Callable[[], Reading]] = {}
    if args.no_trl or find_spec("trl") is None:
        return found
    liger = device.type == "cuda" and find_spec("liger_kernel") is not None
    rows = args.token_budget // (load.prompt + max(load.completions))
    for what, recompute, old in (
        ("everything kept", False, True),
        ("layers recomputed", True, True),
        ("kept, loss alone", False, False),
    ):
        name = f"TRL{' + liger' if liger else ''}, {what}"
        settings = Settings(rows, recompute, old, liger)
        found[name] = lambda name=name, settings=settings: trl(
            shape, load, settings, name=name, device=device, passes=args.passes
        )
    return found


def _tried(name: str, measure: Callable[[], Reading], device: torch.device) -> Reading | None:
    try:
        return measure()
    except torch.cuda.OutOfMemoryError as error:
        print(f"{name}: out of memory: {str(error)[:120]}", flush=True)
        return None
    finally:
        gc.collect()  # compiled layers refer to themselves
        if device.type == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(main())
