"""The report of a run: one HTML page that holds everything, pictures too, and asks the network for nothing."""

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from syncline.observe.curves import CURVES, before_after_png, curve_png, rewards_png, with_throughput
from syncline.observe.files import CONFIG_FILE, read_lines, write_atomically
from syncline.observe.page import group_html, number, page, section
from syncline.observe.sinks import METRICS_FILE, ROLLOUTS_FILE
from syncline.observe.summary import summarise

REPORT_FILE = "report.html"
NUM_SAMPLE_STEPS = 6
"""Steps whose rollouts are shown: the first, the last, and some between."""

SUMMARY_LABELS = {
    "steps": "Steps",
    "reward_first": "Reward, first steps",
    "reward_last": "Reward, last steps",
    "heldout_before": "Held-out accuracy before",
    "heldout_after": "Held-out accuracy after",
    "train_seconds": "Training, seconds",
    "wait_seconds": "… waiting for samples",
    "learn_seconds": "… learning",
    "sync_seconds": "… syncing weights",
    "sampled_tokens": "Tokens sampled",
    "parity_mean_abs_diff": "Parity, worst mean |Δ logprob|",
    "parity_k3_kl": "Parity, worst k3 KL",
}


def write_report(run_dir: Path) -> Path:
    """Writes `report.html` from the files of a run, finished or not, and returns its path."""
    rows = with_throughput(read_lines(run_dir / METRICS_FILE))
    summary = summarise(run_dir)
    pictures = [before_after_png(summary["heldout_before"], summary["heldout_after"])]
    pictures += [curve_png(curve, rows) for curve in CURVES]
    config = run_dir / CONFIG_FILE
    sections = [
        section("Summary", _summary_table(summary)),
        section("Curves", pictures_html(pictures) or "<p>No step was logged yet.</p>"),
        section("Sample rollouts", _rollouts(read_lines(run_dir / ROLLOUTS_FILE))),
        section("Configuration", f"<pre>{escape(config.read_text())}</pre>" if config.exists() else ""),
    ]
    return write_atomically(run_dir / REPORT_FILE, page(f"syncline: {run_dir.name}", sections))


def write_comparison_report(run_dirs: Sequence[Path], out: Path) -> Path:
    """Several runs, such as the seeds of one configuration: rewards in one picture, numbers in one table."""
    labels = _distinct_labels(run_dirs)
    picture = rewards_png(
        {label: read_lines(path / METRICS_FILE) for label, path in zip(labels, run_dirs, strict=True)}
    )
    summaries = {label: summarise(path) for label, path in zip(labels, run_dirs, strict=True)}
    sections = [
        section("Reward", pictures_html([picture], css_class="wide")),
        section("Runs", _comparison_table(summaries)),
    ]
    return write_atomically(out, page(f"syncline: {len(run_dirs)} runs", sections))


def _distinct_labels(run_dirs: Sequence[Path]) -> list[str]:
    names = [path.name for path in run_dirs]
    return names if len(set(names)) == len(names) else [str(path) for path in run_dirs]


def _summary_table(summary: Mapping[str, Any]) -> str:
    engine = summary["engine"]
    rows = [(label, number(summary[key])) for key, label in SUMMARY_LABELS.items() if summary[key] is not None]
    if engine is not None:
        rows.append(("Engine", " ".join(str(part) for part in engine.values() if part)))
    cells = "".join(f"<tr><th>{escape(label)}</th><td>{escape(value)}</td></tr>" for label, value in rows)
    return f"<table>{cells}</table>"


def _comparison_table(summaries: Mapping[str, Mapping[str, Any]]) -> str:
    keys = [key for key in SUMMARY_LABELS if any(s[key] is not None for s in summaries.values())]
    head = "".join(f"<th>{escape(text)}</th>" for text in ("Run", *(SUMMARY_LABELS[key] for key in keys)))
    body = "".join(
        f"<tr><th>{escape(label)}</th>" + "".join(f"<td>{escape(number(s[key]))}</td>" for key in keys) + "</tr>"
        for label, s in summaries.items()
    )
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def pictures_html(pictures: Sequence[bytes | None], *, css_class: str = "curve") -> str:
    """PNGs as images that lie in the page itself; `None` is left out."""
    images = [
        f'<img class="{css_class}" alt="" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
        for png in pictures
        if png is not None
    ]
    return f'<div class="curves">{"".join(images)}</div>' if images else ""


def _rollouts(lines: Sequence[Mapping[str, Any]]) -> str:
    steps = sorted({line["step"] for line in lines})
    shown = (
        {steps[i * (len(steps) - 1) // max(1, NUM_SAMPLE_STEPS - 1)] for i in range(NUM_SAMPLE_STEPS)}
        if steps
        else set()
    )
    groups = [group_html(line) for line in lines if line["step"] in shown]
    return "".join(groups) or "<p>No rollout was kept.</p>"
