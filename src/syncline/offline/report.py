"""The report of a pipeline: one HTML page with the numbers before and after, their intervals, curves and examples."""

import json
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from syncline.config.offline import load_offline
from syncline.envs.estimators import wilson
from syncline.errors import ConfigError
from syncline.observe.curves import Curve, curve_png
from syncline.observe.files import read_lines, read_object, write_atomically
from syncline.observe.page import number, page, section
from syncline.observe.report import REPORT_FILE, pictures_html
from syncline.observe.sinks import METRICS_FILE
from syncline.observe.summary import SUMMARY_FILE
from syncline.offline.assess import read_marks
from syncline.offline.marks import GREEDY
from syncline.offline.stage import MANIFEST_FILE

PIPELINE_FILE = "pipeline.yaml"
DPO_CURVES = (
    Curve("Loss", {"loss": "loss"}),
    Curve("Margin of rewards", {"rewards/margins": "chosen − rejected"}, unit="nats"),
    Curve("Log-probabilities of the batch", {"logps/chosen": "chosen", "logps/rejected": "rejected"}, unit="nats"),
    Curve("Guard: the same chosen answers", {"guard/chosen_logprob": "mean"}, unit="nats / token"),
    Curve("Pairs told apart", {"rewards/accuracies": "share"}),
    Curve("Gradient norm", {"grad_norm": "before clipping"}),
)
LEFT_OUT = ("model", "sets", "tokens")


def write_offline_report(run_dir: Path, *, num_examples: int) -> Path:
    """Raises `ConfigError` for a folder in which no pipeline has ended."""
    summary = read_object(run_dir / SUMMARY_FILE)
    if summary is None or "evaluations" not in summary:
        raise ConfigError([f"{run_dir}: holds no {SUMMARY_FILE} of a pipeline that ended; run `syncline pipeline`"])
    stages = [one[name] for one in summary["rounds"] for name in one]
    folders = [*dict.fromkeys([e["folder"] for e in summary["evaluations"]] + stages)]
    sections = [
        section("Before and after", _comparison_table(summary)),
        section("Accuracy", pictures_html(list(_accuracy_pictures(summary)))),
        section("At k", _at_k_table(summary)),
        section(
            "Direct preference optimisation",
            pictures_html([curve_png(c, _steps(run_dir, summary)) for c in DPO_CURVES]),
        ),
        section("Rounds", "".join(_round(run_dir, i, own) for i, own in enumerate(summary["rounds"], start=1))),
        section("Answers that changed", _examples(run_dir, summary, num_examples)),
        section("Stages", _stages(run_dir, folders)),
        section("Configuration", f"<pre>{escape((run_dir / PIPELINE_FILE).read_text())}</pre>"),
    ]
    return write_atomically(run_dir / REPORT_FILE, page(f"syncline: {run_dir.name}", sections))


def _comparison_table(summary: Mapping[str, Any]) -> str:
    head = ["Set", "Questions", "Before", "After", "Fixed", "Broken", "McNemar p"]
    head += ["Format", "Truncated", "lm-eval flexible"]
    last = summary["evaluations"][-1]["sets"]
    rows = []
    for name, found in summary["comparisons"].items():
        greedy = last[name]["greedy"]
        harness = last[name]["lm_eval"]["flexible-extract"]
        cells = [name, number(count := found["num_questions"])]
        cells += [_with_interval(found[f"accuracy_{when}"], count) for when in ("before", "after")]
        cells += [number(found["fixed"]), number(found["broken"]), f"{found['p']:.3g}"]
        cells += [number(greedy["format_rate"]), number(greedy["truncated_rate"])]
        rows.append([*cells, f"{harness['accuracy']:.4f} ({harness['agreement']:.1%} as ours)"])
    sampled = {name: found["sampled"] for name, found in summary["comparisons"].items() if found["sampled"]}
    told = "".join(
        f"{name}: of the sampled answers {own['before']:.4f} were right before and {own['after']:.4f} after; "
        f"{own['better']} questions became better, {own['worse']} worse (sign test p = {own['p']:.3g}). "
        for name, own in sampled.items()
    )
    told += "In the table: greedy answers; intervals are Wilson's at 95 %. The model after is "
    return _table(head, rows) + f"<p>{escape(told)}<code>{escape(summary['evaluations'][-1]['model'])}</code>.</p>"


def _with_interval(accuracy: float, num_questions: int) -> str:
    low, high = wilson(accuracy * num_questions, num_questions)
    return f"{accuracy:.4f} [{low:.4f}, {high:.4f}]"


def _accuracy_pictures(summary: Mapping[str, Any]) -> Iterator[bytes | None]:
    """By round, and, of the first and the last model, by k."""
    names = list(summary["comparisons"])
    rows = [
        {"step": own["round"], **{name: own["sets"][name]["greedy"]["accuracy"] for name in names}}
        for own in summary["evaluations"]
    ]
    yield curve_png(Curve("Greedy accuracy", {name: name for name in names}, "share right", x_label="round"), rows)
    first, last = (summary["evaluations"][i]["sets"] for i in (0, -1))
    for name in names:
        kinds = {"pass_at": "pass@k", "majority_at": "maj@k"}
        labels = {f"{when} {kind}": f"{told} {when}" for kind, told in kinds.items() for when in ("before", "after")}
        points = [
            {"step": int(k)}
            | {
                f"{when} {kind}": own[name][kind][k]["rate"]
                for kind in kinds
                for when, own in (("before", first), ("after", last))
            }
            for k in first[name]["pass_at"]
        ]
        yield curve_png(Curve(f"{name}: of k samples", labels, "share right", x_label="k"), points)


def _at_k_table(summary: Mapping[str, Any]) -> str:
    rows = []
    for own in summary["evaluations"]:
        for name, found in own["sets"].items():
            for label, field in (("pass", "pass_at"), ("maj", "majority_at")):
                for k, at in found[field].items():
                    low, high = at["interval"]
                    rows.append((str(own["round"]), name, f"{label}@{k}", f"{at['rate']:.4f} [{low:.4f}, {high:.4f}]"))
    return _table(("Round", "Set", "", "Rate"), rows) if rows else ""


def _steps(run_dir: Path, summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Of all rounds, one after the other."""
    rows: list[dict[str, Any]] = []
    for own in summary["rounds"]:
        done = rows[-1]["step"] if rows else 0
        rows += [row | {"step": done + row["step"]} for row in read_lines(run_dir / own["dpo"] / METRICS_FILE)]
    return rows


def _round(run_dir: Path, index: int, own: Mapping[str, str]) -> str:
    tables = []
    for name, folder in own.items():
        facts = {k: v for k, v in _manifest(run_dir, folder)["facts"].items() if k not in LEFT_OUT}
        rows = [(key, value if isinstance(value, str) else json.dumps(value)) for key, value in facts.items()]
        tables.append(f"<p><b>{escape(name)}</b> {escape(folder)}</p>{_table(('', ''), rows)}")
    return f"<details><summary>Round {index}</summary>{''.join(tables)}</details>"


def _examples(run_dir: Path, summary: Mapping[str, Any], count: int) -> str:
    """Of the first set: questions whose answer became right and, as many if there are, those whose became wrong."""
    config = load_offline(run_dir / PIPELINE_FILE)
    own = config.eval.sets[0]
    folders = [run_dir / summary["evaluations"][i]["folder"] for i in (0, -1)]
    before, after = (
        [m for m in read_marks(config.eval, f, own, seed=config.run.seed) if m.arm == GREEDY] for f in folders
    )
    changed = [(a, b) for a, b in zip(before, after, strict=True) if a.is_correct != b.is_correct]
    fixed, broken = ([pair for pair in changed if pair[1].is_correct == right] for right in (True, False))
    num_fixed = max(count - len(broken), count // 2)
    shown = [*fixed[:num_fixed], *broken[: count - min(num_fixed, len(fixed))]]
    rows = [(a.question, a.gold, a.text, b.text, "right" if b.is_correct else "wrong") for a, b in shown]
    return _table(("Question", "Answer", "Before", "After", "Now"), rows) if rows else "<p>None did.</p>"


def _stages(run_dir: Path, folders: Sequence[str]) -> str:
    rows = []
    for folder in folders:
        manifest = _manifest(run_dir, folder)
        seconds = f"{manifest['seconds']:.1f}"
        versions = ", ".join(f"{name} {found}" for name, found in manifest["attempts"][-1]["versions"].items())
        rows.append((folder, seconds, number(manifest["tokens"]), str(len(manifest["attempts"])), versions))
    return _table(("Stage", "Seconds", "Tokens", "Attempts", "Versions"), rows)


def _manifest(run_dir: Path, folder: str) -> dict[str, Any]:
    found = read_object(run_dir / folder / MANIFEST_FILE)
    if found is None:
        raise ConfigError([f"{run_dir / folder}: is gone, and {SUMMARY_FILE} names it; run `syncline pipeline` again"])
    return found


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells are texts, and escaped."""
    first = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{first}</tr>{body}</table></div>'
