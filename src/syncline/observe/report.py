"""The report of a run: one HTML page that holds everything, pictures too, and asks the network for nothing.

Whatever came out of a model or a data set is escaped: it is text for people, never markup.
"""

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from syncline.observe.curves import CURVES, before_after_png, curve_png, rewards_png, with_throughput
from syncline.observe.files import CONFIG_FILE, read_lines, write_atomically
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
        _section("Summary", _summary_table(summary)),
        _section("Curves", _pictures(pictures) or "<p>No step was logged yet.</p>"),
        _section("Sample rollouts", _rollouts(read_lines(run_dir / ROLLOUTS_FILE))),
        _section("Configuration", f"<pre>{escape(config.read_text())}</pre>" if config.exists() else ""),
    ]
    return write_atomically(run_dir / REPORT_FILE, _page(f"syncline: {run_dir.name}", sections))


def write_comparison_report(run_dirs: Sequence[Path], out: Path) -> Path:
    """Several runs, such as the seeds of one configuration: rewards in one picture, numbers in one table."""
    labels = _distinct_labels(run_dirs)
    picture = rewards_png(
        {label: read_lines(path / METRICS_FILE) for label, path in zip(labels, run_dirs, strict=True)}
    )
    summaries = {label: summarise(path) for label, path in zip(labels, run_dirs, strict=True)}
    sections = [
        _section("Reward", _pictures([picture], css_class="wide")),
        _section("Runs", _comparison_table(summaries)),
    ]
    return write_atomically(out, _page(f"syncline: {len(run_dirs)} runs", sections))


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


def number(value: float | None) -> str:
    """`12345` → `12,345`, `0.51234` → `0.5123`, `0.00001234` → `1.234e-05`, nothing measured → `n/a`."""
    if value is None:
        return "n/a"
    if float(value).is_integer():
        return f"{value:,.0f}"
    return f"{value:,.1f}" if abs(value) >= 100 else f"{value:.4g}"


def _pictures(pictures: Sequence[bytes | None], *, css_class: str = "curve") -> str:
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
    groups = [_group(line) for line in lines if line["step"] in shown]
    return "".join(groups) or "<p>No rollout was kept.</p>"


def _group(line: Mapping[str, Any]) -> str:
    title = f"step {line['step']} · {line['environment']} · task {line['task_index']}"
    prompt = "".join(f'<p class="said"><b>{escape(m["role"])}</b> {escape(m["content"])}</p>' for m in line["prompt"])
    attempts = "".join(_attempt(rollout) for rollout in line["rollouts"])
    head = "".join(f"<th>{name}</th>" for name in ("reward", "advantage", "status", "tokens", "version", "completion"))
    table = f'<div class="scroll"><table class="attempts"><tr>{head}</tr>{attempts}</table></div>'
    return f"<details><summary>{escape(title)}</summary>{prompt}{table}</details>"


def _attempt(rollout: Mapping[str, Any]) -> str:
    versions = ", ".join(str(version) for version in rollout["versions"])
    said = rollout["error"] if rollout["completion"] is None else rollout["completion"]
    parts = ", ".join(f"{name} {number(value)}" for name, value in rollout["reward_parts"].items())
    cells = (
        (number(rollout["reward"]), parts),
        (number(rollout["advantage"]), ""),
        (rollout["status"], rollout["error"] or ""),
        (str(rollout["num_tokens"]), ""),
        (versions, ""),
    )
    small = "".join(f'<td title="{escape(hover)}">{escape(text)}</td>' for text, hover in cells)
    return f'<tr>{small}<td class="text">{escape(said or "")}</td></tr>'


def _section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{body}</section>" if body else ""


def _page(title: str, sections: Sequence[str]) -> str:
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style>'
    body = f"<h1>{escape(title)}</h1>{''.join(sections)}"
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{body}</body></html>\n'


STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1e293b; background: #f8fafc }
body { max-width: 1240px; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.1rem; margin: 0 0 .8rem }
section { background: #fff; border: 1px solid #e2e8f0; border-radius: 10px }
section { padding: 1.1rem 1.3rem; margin: 1.1rem 0 }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { text-align: left; vertical-align: top; padding: .28rem .9rem .28rem 0; border-bottom: 1px solid #f1f5f9 }
th { font-weight: 600; color: #475569 }
.curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(420px, 1fr)); gap: 1rem }
.curves img { width: 100%; max-width: 620px } .curves img.wide { max-width: 1060px }
.scroll { overflow-x: auto }
details { border-top: 1px solid #f1f5f9; padding: .45rem 0 } summary { cursor: pointer; font-weight: 600 }
pre, .text, .said { font: 13px/1.45 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere }
pre { margin: 0 } .text { min-width: 24rem } .said { margin: .4rem 0; color: #334155 }
"""
