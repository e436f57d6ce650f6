"""The demo's task with sampling and learning in turn, or at once: what it gains, and that the reward is the same.

    python benchmarks/demo_staleness.py                                       # bridge shared, staleness 0, 1 and 2
    python benchmarks/demo_staleness.py --bridges restart broadcast --staleness 0 1
    python benchmarks/demo_staleness.py --gpus 0,1 --bridges broadcast        # the learner on GPU 0, its engine on 1

Runs `configs/demo.yaml` once a row. `gain` is how much faster than the first row of its bridge and seed; `ahead` the
mean share of the next batch that was sampled before the step had ended: 0 when the two take turns.
"""

import argparse
import itertools
import json
import queue
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

from demo_bridges import ROOT, VARIANTS, run, summary

GROUPS_PER_STEP = 32
COLUMNS = (
    *("reward_first", "reward_last", "heldout_after", "train_seconds", "gain", "wait_seconds"),
    *("staleness_mean", "staleness_max", "ahead", "dropped"),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bridges", nargs="+", choices=VARIANTS, default=["shared"], metavar="NAME")
    parser.add_argument("--staleness", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--gpus", default="", help="the runs' CUDA_VISIBLE_DEVICES")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "staleness")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="fields set over configs/demo.yaml's")
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT / "recipes" / "demo"))
    from base_model import build_base_model

    base, first, worst = build_base_model(ROOT / "runs" / "base"), dict[tuple[str, int], float](), 0
    print(f"{'bridge':12}{'seed':>5}{'bound':>6}" + "".join(f"{column:>15}" for column in COLUMNS), flush=True)
    for bridge, seed, bound in itertools.product(args.bridges, args.seeds, args.staleness):
        folder = args.out / f"{bridge.replace(', ', '-').replace(' + ', '-')}-{seed}-{bound}"
        fields = (f"run.max_staleness={bound}", f"run.groups_per_step={GROUPS_PER_STEP}", *args.overrides)
        places: queue.SimpleQueue[str] = queue.SimpleQueue()
        places.put(args.gpus)
        code = run(bridge, folder, base, seed, places, fields)
        worst, cells = max(worst, code), "   failed: see its log"
        if code == 0:
            row = measured(folder, first.get((bridge, seed)))
            first.setdefault((bridge, seed), row["train_seconds"])
            cells = "".join(f"{row[column]:15.2f}" for column in COLUMNS)
        print(f"{bridge:12}{seed:5}{bound:6}{cells}", flush=True)
    return worst


def measured(folder: Path, first_seconds: float | None) -> Mapping[str, float]:
    """A row's numbers; `first_seconds` are those of the row it is compared with, `None` for that row itself."""
    total = summary(folder)
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        **{column: total[column] for column in COLUMNS if column in total},
        "gain": (first_seconds or total["train_seconds"]) / total["train_seconds"],
        "staleness_mean": mean_of(steps, "sample/staleness_mean"),
        "staleness_max": max(step["sample/staleness_max"] for step in steps),
        "ahead": min(1.0, mean_of(steps, "queue/length") / GROUPS_PER_STEP),
        "dropped": steps[-1]["queue/stale"],
    }


def mean_of(steps: Sequence[Mapping[str, float]], name: str) -> float:
    return fmean(step[name] for step in steps)


if __name__ == "__main__":
    sys.exit(main())
