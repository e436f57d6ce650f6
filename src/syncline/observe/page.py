"""HTML pages that hold everything they show and ask the network for nothing: rollouts, and the parts of a report.

Whatever came out of a model or a data set is escaped: it is text for people, never markup.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from syncline.observe.files import write_atomically


def write_rollouts_page(groups: Sequence[Mapping[str, Any]], out: Path, *, limit: int) -> Path:
    """The first `limit` of the groups, each as `sinks.group_for_people` tells it, under the numbers of all."""
    rollouts = [rollout for group in groups for rollout in group["rollouts"]]
    rewards = [rollout["reward"] for rollout in rollouts if rollout["reward"] is not None]
    statuses = Counter(rollout["status"] for rollout in rollouts)
    told = [
        ("Groups", f"{len(groups)}, the first {limit} of them below" if len(groups) > limit else str(len(groups))),
        ("Rollouts", ", ".join(f"{count} {status}" for status, count in sorted(statuses.items()))),
        ("Mean reward", number(sum(rewards) / len(rewards) if rewards else None)),
    ]
    cells = "".join(f"<tr><th>{escape(label)}</th><td>{escape(value)}</td></tr>" for label, value in told)
    shown = "".join(group_html(group) for group in groups[:limit])
    return write_atomically(
        out, page(out.stem, [section("Summary", f"<table>{cells}</table>"), section("Groups", shown)])
    )


def number(value: float | None) -> str:
    """`12345` → `12,345`, `0.51234` → `0.5123`, `0.00001234` → `1.234e-05`, nothing measured → `n/a`."""
    if value is None:
        return "n/a"
    if float(value).is_integer():
        return f"{value:,.0f}"
    return f"{value:,.1f}" if abs(value) >= 100 else f"{value:.4g}"


def group_html(line: Mapping[str, Any]) -> str:
    step = f"step {line['step']} · " if "step" in line else ""
    title = f"{step}{line['environment']} · task {line['task_index']}"
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


def section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{body}</section>" if body else ""


def page(title: str, sections: Sequence[str]) -> str:
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
