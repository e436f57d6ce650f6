"""From a metrics line to what is shown."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from syncline.observe.progress import Progress, duration, row

STEP = {
    "step": 12,
    "reward": 0.53125,
    "tokens/sampled": 2400,
    "time/step_seconds": 2.0,
    "time/sync_seconds": 0.125,
    "queue/length": 4,
}


def test_a_row_shows_step_reward_speed_sync_queue_and_time_left() -> None:
    shown = row(STEP, 100, seconds_per_step=2.5)
    assert shown.eta_seconds == 220.0
    assert shown.text() == "step 12/100  reward 0.531  1,200 tokens/s  sync 0.12 s  queue 4  ETA 3:40"


def test_what_was_not_measured_is_not_shown() -> None:
    assert row({"step": 3, "reward": None}, 10).text() == "step 3/10"


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (75, "1:15"), (3675.4, "1:01:15")])
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def append(folder: Path, *rows: dict) -> None:
    with (folder / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def test_without_a_terminal_each_new_step_is_one_plain_line(tmp_path: Path) -> None:
    append(tmp_path, {"step": 1, "time/step_seconds": 100.0})
    out = io.StringIO()
    with Progress(tmp_path, 4, console=Console(file=out)) as progress:
        append(tmp_path, {"step": 2, "time/step_seconds": 10.0})
        progress.refresh()
        progress.refresh()
        progress.print("engine | [bold]not markup[/bold] " + "x" * 200)
        append(tmp_path, {"step": 3, "time/step_seconds": 5.0})
    assert out.getvalue().splitlines() == [
        "step 2/4  ETA 0:20",
        "engine | [bold]not markup[/bold] " + "x" * 200,
        "step 3/4  ETA 0:09",
    ]


def test_on_a_terminal_log_lines_scroll_above_the_bar(tmp_path: Path) -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=100, color_system=None)
    with Progress(tmp_path, 4, console=console) as progress:
        append(tmp_path, {"step": 2, "reward": 0.5})
        progress.refresh()
        progress.print("engine | ready")
    text = out.getvalue()
    assert text.index("step 2/4  reward 0.500") < text.index("engine | ready"), "the bar is there, then gives way"
    assert "\x1b[2K" in text, "the bar's line is wiped, not repeated"
