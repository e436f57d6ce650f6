"""Live progress of a run, fed by the metrics the learner appends.

On a terminal: one bar that stays at the bottom while log lines scroll above it. Elsewhere: one plain line a step.
The learner writes `metrics.jsonl`; whoever watches the run calls `refresh` now and then; nobody waits.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from syncline.observe.files import LineFollower, loop_tokens_per_second
from syncline.observe.sinks import METRICS_FILE

SMOOTHING = 0.8
"""Weight of the past in the step time that the time left is reckoned from."""


@dataclass(frozen=True, slots=True)
class Row:
    """What is shown of one step; `None` where the step did not measure it."""

    step: int
    num_steps: int
    reward: float | None
    tokens_per_second: float | None
    sync_seconds: float | None
    queue_length: float | None
    eta_seconds: float | None

    def text(self) -> str:
        parts = [
            f"step {self.step}/{self.num_steps}",
            _shown("reward {:.3f}", self.reward),
            _shown("{:,.0f} tokens/s", self.tokens_per_second),
            _shown("sync {:.2f} s", self.sync_seconds),
            _shown("queue {:.0f}", self.queue_length),
            "" if self.eta_seconds is None else f"ETA {duration(self.eta_seconds)}",
        ]
        return "  ".join(part for part in parts if part)


def row(metrics: Mapping[str, Any], num_steps: int, *, seconds_per_step: float | None = None) -> Row:
    """One line of `metrics.jsonl` → what is shown. `seconds_per_step` is what the time left is reckoned from."""
    step = metrics["step"]
    return Row(
        step=step,
        num_steps=num_steps,
        reward=metrics.get("reward"),
        tokens_per_second=loop_tokens_per_second(metrics),
        sync_seconds=metrics.get("time/sync_seconds"),
        queue_length=metrics.get("queue/length"),
        eta_seconds=None if seconds_per_step is None else max(0, num_steps - step) * seconds_per_step,
    )


def duration(seconds: float) -> str:
    """`75` → `1:15`, `3675` → `1:01:15`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Progress:
    """Shows a run's steps as they are logged; `refresh` reads what is new, `print` puts a line above the bar."""

    def __init__(self, run_dir: Path, num_steps: int, *, console: Console) -> None:
        self._lines = LineFollower(run_dir / METRICS_FILE, from_end=True)
        self._num_steps = num_steps
        self._console = console
        self._seconds: float | None = None
        self._live = Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.refresh()
        if self._live:
            self._live.stop()

    def refresh(self) -> None:
        for line in self._lines.poll():
            metrics = json.loads(line)
            self._seconds = _smoothed(self._seconds, metrics.get("time/step_seconds"))
            self._show(row(metrics, self._num_steps, seconds_per_step=self._seconds))

    def print(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _show(self, shown: Row) -> None:
        if self._live is None:
            self.print(shown.text())
            return
        bar = Table.grid(padding=(0, 1))
        bar.add_row(ProgressBar(total=shown.num_steps, completed=shown.step, width=30), shown.text())
        self._live.update(bar, refresh=True)


def _shown(template: str, value: float | None) -> str:
    return "" if value is None else template.format(value)


def _smoothed(past: float | None, new: float | None) -> float | None:
    if past is None or new is None:
        return new if past is None else past
    return SMOOTHING * past + (1 - SMOOTHING) * new
