"""The offline demo: build a small model that adds badly (cached), then `syncline pipeline configs/offline_demo.yaml`.

    python recipes/demo/offline.py [a.b=c …]

Killed at any moment, the same command goes on. It ends with the accuracy on held-out sums before and after, with
intervals and a paired test, and with the path of `runs/offline-demo/report.html`.
"""

import sys
import time
from pathlib import Path

from base_model import Recipe, build_base_model

from syncline.cli import main as syncline

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs" / "offline_demo.yaml"
RUNS = ROOT / "runs"
BASE = Recipe(num_steps=160, num_noisy_steps=60)
"""Fewer steps than the other demo's: also its likeliest answer is wrong for one sum in seven."""


def main() -> int:
    started = time.monotonic()
    base = build_base_model(RUNS / "base", BASE)
    print(f"base model: {base} ({time.monotonic() - started:.0f} s)", flush=True)
    return syncline(["pipeline", str(CONFIG), f"model.path={base}", f"run.dir={RUNS / 'offline-demo'}", *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
