"""Curves of a run as PNG bytes, drawn by matplotlib without a display and without its global state."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from syncline.observe.files import loop_tokens_per_second, series

COLOURS = ("#2563eb", "#d97706", "#059669", "#db2777", "#7c3aed", "#475569")
LOOP_TOKENS = "tokens/loop_per_second"
"""Not logged: reckoned from what is, by `with_throughput`."""
Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Curve:
    """One picture: the metrics drawn together, under the names people read. `band` is drawn as ± around the first."""

    title: str
    metrics: Mapping[str, str]
    unit: str = ""
    band: str | None = None
    stacked: bool = False
    x_label: str = "step"


CURVES = (
    Curve("Reward", {"reward": "mean of the step"}, band="reward_std"),
    Curve("Completion length", {"completions/mean_length": "mean"}, unit="tokens"),
    Curve("Completions cut off by the length limit", {"completions/clipped_ratio": "share"}),
    Curve(
        "Sampler against learner",
        {
            "kl": "KL to the reference",
            "sampling/sampling_logp_difference/mean": "mean |Δ logprob| while sampling",
            "parity/mean_abs_diff": "mean |Δ logprob|, parity gate",
            "parity/k3_kl": "k3 KL, parity gate",
        },
    ),
    Curve(
        "Weight sync",
        {"time/sync_seconds": "whole sync", "sync/pause_seconds": "of it, the engine paused"},
        unit="seconds",
    ),
    Curve(
        "Throughput", {LOOP_TOKENS: "whole loop", "tokens/trained_per_second": "while learning"}, unit="tokens / second"
    ),
    Curve(
        "Where a step's time goes",
        {"time/wait_seconds": "sample (wait)", "time/learn_seconds": "learn", "time/sync_seconds": "sync"},
        unit="seconds",
        stacked=True,
    ),
    Curve("Queue", {"queue/length": "groups waiting"}),
    Curve(
        "Age of the tokens trained on",
        {"sample/staleness_mean": "mean", "sample/staleness_max": "oldest"},
        unit="versions",
    ),
    Curve(
        "Tokens after the off-policy correction",
        {"sampling/kept_ratio": "inside the band", "sampling/importance_sampling_ratio/ess": "effective sample size"},
        unit="share",
    ),
    Curve("Groups whose rewards are all equal", {"frac_reward_zero_std": "share of those trained on"}),
    Curve("Entropy", {"entropy": "policy"}, unit="nats / token"),
    Curve("Gradient norm", {"grad_norm": "before clipping"}),
    Curve("Loss", {"loss": "loss"}),
    Curve("Learning rate", {"learning_rate": "learning rate"}),
)


def with_throughput(rows: Rows) -> list[Mapping[str, Any]]:
    """The rows, each with the tokens per second of its whole step."""
    return [{**row, LOOP_TOKENS: loop_tokens_per_second(row)} for row in rows]


def curve_png(curve: Curve, rows: Rows) -> bytes | None:
    """The picture, or `None` when no step measured any of its metrics."""
    drawn = {label: found for name, label in curve.metrics.items() if (found := series(rows, name))}
    if not drawn:
        return None
    figure, axes = _canvas(curve.title, curve.unit, x_label=curve.x_label)
    if curve.stacked:
        _stack(axes, drawn)
    else:
        _lines(axes, drawn)
    if curve.band is not None:
        _band(axes, series(rows, next(iter(curve.metrics))), dict(series(rows, curve.band)))
    if len(drawn) > 1:
        axes.legend(frameon=False, fontsize=8)
    return _png(figure)


def before_after_png(before: float | None, after: float | None) -> bytes | None:
    """Held-out accuracy as two bars; `None` when neither was measured."""
    bars = {name: value for name, value in (("before", before), ("after", after)) if value is not None}
    if not bars:
        return None
    figure, axes = _canvas("Held-out accuracy", "share right", x_label="")
    drawn = axes.bar(list(bars), list(bars.values()), color=COLOURS[: len(bars)], width=0.5)
    axes.bar_label(drawn, fmt="%.3f", fontsize=9)
    axes.set_ylim(0, 1.08)
    return _png(figure)


def rewards_png(runs: Mapping[str, Rows]) -> bytes | None:
    """The reward of several runs in one picture; `None` when none of them measured it."""
    drawn = {label: found for label, rows in runs.items() if (found := series(rows, "reward"))}
    if not drawn:
        return None
    figure, axes = _canvas("Reward", "", wide=True)
    _lines(axes, drawn)
    axes.legend(frameon=False, fontsize=8)
    return _png(figure)


def _canvas(title: str, unit: str, *, x_label: str = "step", wide: bool = False) -> tuple[Figure, Any]:
    figure = Figure(figsize=(9.6, 4.2) if wide else (5.6, 3.1), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=11, loc="left", fontweight="bold")
    axes.set_xlabel(x_label, fontsize=9)
    axes.set_ylabel(unit, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _lines(axes: Any, drawn: Mapping[str, Sequence[tuple[int, float]]]) -> None:
    """Single points, such as a parity check every twenty steps, stay visible as dots."""
    for (label, points), colour in zip(drawn.items(), cycle(COLOURS), strict=False):
        steps, values = zip(*points, strict=True)
        axes.plot(steps, values, label=label, color=colour, linewidth=1.5, marker="." if len(points) < 40 else None)


def _band(axes: Any, points: Sequence[tuple[int, float]], widths: Mapping[int, float]) -> None:
    banded = [(step, value - widths[step], value + widths[step]) for step, value in points if step in widths]
    if banded:
        steps, low, high = zip(*banded, strict=True)
        axes.fill_between(steps, low, high, color=COLOURS[0], alpha=0.12, linewidth=0)


def _stack(axes: Any, drawn: Mapping[str, Sequence[tuple[int, float]]]) -> None:
    steps = sorted({step for points in drawn.values() for step, _ in points})
    layers = [[dict(points).get(step, 0.0) for step in steps] for points in drawn.values()]
    axes.stackplot(steps, layers, labels=list(drawn), colors=COLOURS, alpha=0.85)


def _png(figure: Figure) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png")
    return out.getvalue()
