"""The demo's task through every bridge: the reward must not depend on how the weights travel.

    python benchmarks/demo_bridges.py                    # one after another
    python benchmarks/demo_bridges.py --gpus 0,1 2,3     # two at a time, each on its own pair of GPUs

Runs `configs/demo.yaml` once a bridge with one seed, then prints a table and writes `comparison.html`. A pair of GPUs
gives `broadcast` the second one for its engine; LoRA runs learn with a larger rate, as adapters need.
"""

import argparse
import json
import os
import queue
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RUN_SECONDS = 900
LORA = ("model.lora={rank: 32, alpha: 64}", "learner.optimizer.learning_rate=2.0e-3")
VARIANTS: dict[str, tuple[str, ...]] = {
    "restart": (),
    "shared": ("bridge.name=shared",),
    "shared, keep": ("bridge.name=shared", "bridge.in_flight=keep"),
    "broadcast": ("bridge.name=broadcast",),
    "restart + LoRA": LORA,
    "shared + LoRA": ("bridge.name=shared", *LORA),
    "lora": ("bridge.name=lora", *LORA),
}
COLUMNS = ("reward_first", "reward_last", "heldout_before", "heldout_after", "train_seconds", "sync_seconds")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--gpus", nargs="+", default=[""], help="each run's CUDA_VISIBLE_DEVICES")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "bridges")
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT / "recipes" / "demo"))
    from base_model import build_base_model

    base = build_base_model(ROOT / "runs" / "base")
    places: queue.SimpleQueue[str] = queue.SimpleQueue()
    for gpus in args.gpus:
        places.put(gpus)
    folders = {name: args.out / name.replace(", ", "-").replace(" + ", "-") for name in args.variants}
    with ThreadPoolExecutor(len(args.gpus)) as threads:
        codes = list(threads.map(lambda name: run(name, folders[name], base, args.seed, places), args.variants))
    done = {name: summary(folders[name]) for name, code in zip(args.variants, codes, strict=True) if code == 0}
    print_table(args.variants, done)
    if len(done) > 1:
        from syncline.observe.report import write_comparison_report

        print(f"curves: {write_comparison_report([folders[name] for name in done], args.out / 'comparison.html')}")
    return max(codes)


def run(
    name: str, folder: Path, base: Path, seed: int, places: "queue.SimpleQueue[str]", overrides: Sequence[str] = ()
) -> int:
    """One `syncline run`, its output in a file beside its folder. Returns the exit code."""
    gpus = places.get()
    fields = [f"run.dir={folder}", f"run.seed={seed}", f"model.path={base}", *VARIANTS[name], *overrides]
    if name == "broadcast" and "," in gpus:
        fields.append("engine.devices=[1]")
    argv = [sys.executable, "-m", "syncline", "run", str(ROOT / "configs" / "demo.yaml"), *fields, "--overwrite"]
    environment = os.environ | ({"CUDA_VISIBLE_DEVICES": gpus} if gpus else {})
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        with folder.with_suffix(".log").open("w") as log:
            return subprocess.run(argv, stdout=log, stderr=log, env=environment, timeout=RUN_SECONDS).returncode
    except subprocess.TimeoutExpired:
        return 1
    finally:
        places.put(gpus)


def summary(folder: Path) -> Mapping[str, float]:
    return json.loads((folder / "summary.json").read_text())


def print_table(names: Sequence[str], done: Mapping[str, Mapping[str, float]]) -> None:
    print(f"{'bridge':16}" + "".join(f"{column:>16}" for column in COLUMNS))
    for name in names:
        cells = [f"{done[name][column]:16.2f}" for column in COLUMNS] if name in done else ["   failed: see its log"]
        print(f"{name:16}" + "".join(cells))


if __name__ == "__main__":
    sys.exit(main())
