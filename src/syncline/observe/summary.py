"""`summary.json`: the run in a dozen numbers, for scripts and for the end of the terminal."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from syncline.observe.files import (
    AFTER_FILE,
    BEFORE_FILE,
    ENGINE_FILE,
    read_lines,
    read_object,
    series,
    write_atomically,
)
from syncline.observe.sinks import METRICS_FILE

SUMMARY_FILE = "summary.json"
WINDOW = 5
"""Steps averaged for the first and the last reward; at most half of the run, so the two never overlap."""


def write_summary(run_dir: Path) -> dict[str, Any]:
    """Writes `summary.json` and returns it."""
    summary = summarise(run_dir)
    write_atomically(run_dir / SUMMARY_FILE, json.dumps(summary, indent=2) + "\n")
    return summary


def summarise(run_dir: Path) -> dict[str, Any]:
    """Reads the run's files. A value the run did not measure is `None`.

    `reward_first` and `reward_last` are means over the first and the last `WINDOW` steps; `heldout_*` the accuracy of
    the evaluations; `train_seconds` the sum of the kept steps, without start-up, evaluation and what a kill lost.
    """
    rows = read_lines(run_dir / METRICS_FILE)
    engine = read_object(run_dir / ENGINE_FILE)
    rewards = [value for _, value in series(rows, "reward")]
    window = max(1, min(WINDOW, len(rewards) // 2))
    return {
        "run": run_dir.name,
        "steps": rows[-1]["step"] if rows else 0,
        "reward_first": mean(rewards[:window]),
        "reward_last": mean(rewards[-window:]),
        "reward_window_steps": window,
        "heldout_before": _accuracy(run_dir / BEFORE_FILE),
        "heldout_after": _accuracy(run_dir / AFTER_FILE),
        "train_seconds": _total(rows, "time/step_seconds"),
        "wait_seconds": _total(rows, "time/wait_seconds"),
        "learn_seconds": _total(rows, "time/learn_seconds"),
        "sync_seconds": _total(rows, "time/sync_seconds"),
        "sampled_tokens": _total(rows, "tokens/sampled"),
        "parity_mean_abs_diff": _worst(rows, "parity/mean_abs_diff"),
        "parity_k3_kl": _worst(rows, "parity/k3_kl"),
        "engine": {key: engine.get(key) for key in ("name", "version", "device")} if engine else None,
    }


def mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _total(rows: Sequence[Mapping[str, Any]], name: str) -> float | None:
    measured = series(rows, name)
    return sum(value for _, value in measured) if measured else None


def _worst(rows: Sequence[Mapping[str, Any]], name: str) -> float | None:
    return max((value for _, value in series(rows, name)), default=None)


def _accuracy(path: Path) -> float | None:
    found = read_object(path)
    if found is None:
        return None
    if not isinstance(found.get("accuracy"), int | float):
        raise ValueError(f"{path} has no number under 'accuracy'")
    return float(found["accuracy"])
