"""`syncline pairs`: a stage of its own, whose failure leaves no file that looks like a result."""

import json
from pathlib import Path

import pytest
import yaml
from trajectories import trajectory

from syncline.cli import main


def prepare(folder: Path, correct: str) -> str:
    values = {
        "run": {"dir": str(folder / "run")},
        "model": {"path": "any", "lora": {}},
        "collect": {"questions": {"made": {}}},
        "pairs": {"heldout_fraction": 0.5},
        "eval": {"sets": [{"name": "made", "made": {}}]},
    }
    (folder / "pipeline.yaml").write_text(yaml.safe_dump(values))
    rows = [
        trajectory(sample=i, text=f"{'abcdefgh'[i]} says {n}", correct=c == "+", question=f"what is {n}?")
        for n in range(20)
        for i, c in enumerate(correct)
    ]
    collected = folder / "run" / "collect-0123456789ab" / "rollouts.jsonl"
    collected.parent.mkdir(parents=True, exist_ok=True)
    collected.write_text("".join(row.model_dump_json() + "\n" for row in rows))
    return str(folder / "pipeline.yaml")


def test_pairs_of_the_one_collection_there_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = prepare(tmp_path, "++-")
    assert main(["pairs", file]) == 0
    folder = Path(capsys.readouterr().out.splitlines()[-1]).parent
    sides = [[json.loads(line) for line in (folder / name).read_text().splitlines()] for name in
             ("pairs.jsonl", "pairs_heldout.jsonl")]  # fmt: skip
    questions = [{pair["provenance"]["question_id"] for pair in side} for side in sides]
    assert all(questions) and not questions[0] & questions[1] and len(sides[0]) + len(sides[1]) == 20
    told = json.loads((folder / "pairs_report.json").read_text())
    assert told["pairs"] == {"train": len(sides[0]), "heldout": len(sides[1])}
    before = (folder / "pairs.jsonl").stat().st_mtime_ns
    assert main(["pairs", file]) == 0
    assert (folder / "pairs.jsonl").stat().st_mtime_ns == before, "a finished stage is not done again"
    assert main(["pairs", file, "pairs.strategy=all"]) == 0
    assert Path(capsys.readouterr().out.splitlines()[-1]).parent != folder


@pytest.mark.parametrize("correct", ["+", "--"])
def test_no_pair_is_an_error_and_no_file(tmp_path: Path, correct: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pairs", prepare(tmp_path, correct)]) == 2
    assert "pairs: not one to train on (20 all, 20 all" in capsys.readouterr().err
    assert not list(tmp_path.glob("run/pairs-*/pairs*.jsonl"))


def test_which_collection_must_be_clear(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = prepare(tmp_path, "+-")
    other = tmp_path / "run" / "collect-ba9876543210" / "rollouts.jsonl"
    other.parent.mkdir()
    other.write_text("")
    assert main(["pairs", file]) == 2 and "holds 2 complete collections; name one's" in capsys.readouterr().err
    assert main(["pairs", file, "--rollouts", str(other)]) == 2
    assert "has no trajectories; collect some first" in capsys.readouterr().err
    assert main(["pairs", file, "--rollouts", "nowhere.jsonl"]) == 2
