"""The report: whole in one file, pictures only of what was measured, text from models never markup."""

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from syncline.observe.curves import CURVES, Curve, curve_png
from syncline.observe.report import number, write_comparison_report, write_report

PNG = b"\x89PNG\r\n\x1a\n"
EVIL = "</td><script>alert('x')</script><img src=http://example.org/x.png>"


class Page(HTMLParser):
    """Tags with their attributes, balanced or refused."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self._open: list[str] = []
        self.text = ""
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data + "\n"

    def images(self) -> list[bytes]:
        sources = [attrs["src"] or "" for tag, attrs in self.found if tag == "img"]
        return [base64.b64decode(source.removeprefix("data:image/png;base64,"), validate=True) for source in sources]


def write_run(folder: Path, *, reward: float = 0.5) -> Path:
    folder.mkdir()
    rows = [
        {"step": step, "reward": reward, "reward_std": 0.1, "tokens/sampled": 100, "time/step_seconds": 2.0, "kl": None}
        for step in range(1, 4)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rollout = {
        "completion": EVIL,
        "reward": 1.0,
        "advantage": -0.5,
        "status": "completed",
        "reward_parts": {EVIL: 1.0},
        "num_tokens": 3,
        "versions": [4, 5],
        "error": None,
    }
    failed = rollout | {"completion": None, "reward": None, "status": "error", "error": "engine went away"}
    line = {"step": 2, "environment": EVIL, "task_index": 7, "prompt": [{"role": "user", "content": EVIL}]}
    (folder / "rollouts.jsonl").write_text(json.dumps(line | {"rollouts": [rollout, failed]}) + "\n")
    (folder / "config.yaml").write_text(f"run: {{dir: '{EVIL}'}}\n")
    (folder / "evaluation-before.json").write_text('{"accuracy": 0.25}')
    (folder / "evaluation-after.json").write_text('{"accuracy": 0.75}')
    (folder / "engine.json").write_text('{"name": "vllm", "version": "1.2.3", "device": "cpu"}')
    return folder


def test_the_page_is_whole_and_asks_the_network_for_nothing(tmp_path: Path) -> None:
    text = write_report(write_run(tmp_path / "x")).read_text()
    page = Page(text)
    assert {tag for tag, _ in page.found} & {"script", "link", "iframe"} == set()
    assert all(source.startswith(PNG) for source in page.images())
    assert len(page.images()) == 3, "held-out accuracy, reward and throughput: nothing else was measured"
    assert not re.search(r"(src|href)=[\"'](?!data:)", text)


def test_what_models_and_files_say_is_text(tmp_path: Path) -> None:
    page = Page(write_report(write_run(tmp_path / "x")).read_text())
    assert page.text.count(EVIL) == 4, "title of the group, prompt, completion, configuration"
    assert "engine went away" in page.text
    assert "4, 5" in page.text
    assert "vllm 1.2.3 cpu" in page.text
    assert "0.25" in page.text


def test_a_run_that_logged_nothing_has_a_page(tmp_path: Path) -> None:
    page = Page(write_report(tmp_path).read_text())
    assert page.images() == []
    assert "No step was logged yet." in page.text


def test_runs_are_compared_in_one_picture_and_one_table(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / f"seed-{i}", reward=i / 10) for i in range(3)]
    page = Page(write_comparison_report(runs, tmp_path / "out" / "seeds.html").read_text())
    assert len(page.images()) == 1
    assert [name in page.text for name in ("seed-0", "seed-1", "seed-2")] == [True] * 3
    assert {"0.1", "0.2"} <= set(page.text.splitlines())


def test_runs_of_one_name_are_told_apart_by_their_path(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    runs = [write_run(tmp_path / "a" / "run"), write_run(tmp_path / "b" / "run")]
    text = write_comparison_report(runs, tmp_path / "c.html").read_text()
    assert all(str(run) in text for run in runs)


def test_every_line_is_drawn_however_many() -> None:
    """An evaluation may have any number of sets."""
    rows = [{"step": step, **{f"m{i}": i + step for i in range(8)}} for step in range(3)]
    pictures = {curve_png(Curve("all", {f"m{i}": f"m{i}" for i in range(count)}), rows) for count in range(5, 9)}
    assert len(pictures) == 4


def test_every_curve_draws_one_point_and_many() -> None:
    for curve in CURVES:
        row = {name: 1.0 for name in (*curve.metrics, curve.band) if name}
        for rows in ([{"step": 1, **row}], [{"step": s, **row} for s in range(60)]):
            png = curve_png(curve, rows)
            assert png is not None and png.startswith(PNG)
        assert curve_png(curve, [{"step": 1}]) is None


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "n/a"),
        (12345, "12,345"),
        (0.51234, "0.5123"),
        (123.456, "123.5"),
        (0.00001234, "1.234e-05"),
        (0, "0"),
    ],
)
def test_numbers_for_people(value: float | None, text: str) -> None:
    assert number(value) == text
