"""The demo: build the base model (cached), train it with GRPO, print what came of it.

    python recipes/demo/run.py [--seeds 0 1 2] [a.b=c …]

Every seed is one `syncline run configs/demo.yaml`, the first in `runs/demo`, the others beside it;
`runs/demo/seeds.html` compares several.
"""

import argparse
import json
import sys
import time
from pathlib import Path

from base_model import build_base_model

from syncline.cli import main as syncline
from syncline.observe.report import write_comparison_report

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs" / "demo.yaml"
RUNS = ROOT / "runs"


def main() -> int:
    parser = argparse.ArgumentParser(description="Train the demo's small model with GRPO.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="fields set over configs/demo.yaml's")
    args = parser.parse_args()
    started = time.monotonic()
    base = build_base_model(RUNS / "base")
    print(f"base model: {base} ({time.monotonic() - started:.0f} s)", flush=True)
    folders = [RUNS / ("demo" if i == 0 else f"demo-seed-{seed}") for i, seed in enumerate(args.seeds)]
    for seed, folder in zip(args.seeds, folders, strict=True):
        overrides = [f"run.dir={folder}", f"run.seed={seed}", f"model.path={base}", *args.overrides]
        if code := syncline(["run", str(CONFIG), *overrides, "--overwrite"]):
            return code
    for seed, folder in zip(args.seeds, folders, strict=True):
        print(_result(seed, json.loads((folder / "summary.json").read_text())))
    if len(folders) > 1:
        print(f"all seeds: {write_comparison_report(folders, folders[0] / 'seeds.html')}")
    print(f"report: {folders[0] / 'report.html'}")
    return 0


def _result(seed: int, summary: dict) -> str:
    return (
        f"seed {seed}: reward {summary['reward_first']:.2f} -> {summary['reward_last']:.2f}, held-out accuracy "
        f"{summary['heldout_before']:.2f} -> {summary['heldout_after']:.2f}, {summary['steps']} steps in "
        f"{summary['train_seconds']:.0f} s on {summary['engine']['device']}"
    )


if __name__ == "__main__":
    sys.exit(main())
