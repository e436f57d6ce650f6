"""The run in numbers, worked by hand."""

import json
from pathlib import Path

import pytest

from syncline.observe.summary import summarise, write_summary


def write_rows(folder: Path, rewards: list[float]) -> None:
    rows = [
        {"step": i, "reward": r, "time/step_seconds": 2.0, "time/sync_seconds": 0.5, "parity/k3_kl": i / 100}
        for i, r in enumerate(rewards, start=1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_summary_of_a_finished_run(tmp_path: Path) -> None:
    write_rows(tmp_path, [0.0, 0.1, 0.2, 0.3, 0.4, 9.0, 0.6, 0.7, 0.8, 0.9, 1.0])
    (tmp_path / "evaluation-before.json").write_text('{"accuracy": 0.25}')
    (tmp_path / "evaluation-after.json").write_text('{"accuracy": 1}')
    (tmp_path / "engine.json").write_text('{"name": "vllm", "version": "1", "device": "cpu", "model": "m"}')
    summary = write_summary(tmp_path)
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert summary["reward_first"] == pytest.approx(0.2)
    assert summary["reward_last"] == pytest.approx(0.8)
    assert (summary["heldout_before"], summary["heldout_after"]) == (0.25, 1.0)
    assert (summary["steps"], summary["train_seconds"], summary["sync_seconds"]) == (11, 22.0, 5.5)
    assert summary["parity_k3_kl"] == 0.11
    assert summary["learn_seconds"] is None, "not measured is not 0"
    assert summary["engine"] == {"name": "vllm", "version": "1", "device": "cpu"}


@pytest.mark.parametrize(
    ("rewards", "first", "last"), [([0.5], 0.5, 0.5), ([0, 1, 1], 0, 1), ([0, 0.5, 0, 1], 0.25, 0.5)]
)
def test_first_and_last_windows_of_a_short_run_do_not_overlap(
    tmp_path: Path, rewards: list[float], first: float, last: float
) -> None:
    write_rows(tmp_path, rewards)
    summary = summarise(tmp_path)
    assert (summary["reward_first"], summary["reward_last"]) == (first, last)


def test_a_run_without_a_step_has_a_summary(tmp_path: Path) -> None:
    summary = summarise(tmp_path)
    assert summary["steps"] == 0
    assert {summary[k] for k in ("reward_first", "reward_last", "heldout_before", "train_seconds", "engine")} == {None}


def test_an_evaluation_without_accuracy_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "evaluation-before.json").write_text("{}")
    with pytest.raises(ValueError, match=r"evaluation-before\.json has no number under 'accuracy'"):
        summarise(tmp_path)
