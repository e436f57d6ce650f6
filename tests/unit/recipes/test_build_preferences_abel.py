"""The recipe of phase 3 on the original's file format."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]
TEXTS = ("ant bee cat", "dog elk fox gnu", "hen ibis jay", "kite lark moth newt owl")


def row(question: str, correct: str) -> dict[str, Any]:
    trajectories = [
        {"full_text": TEXTS[i], "answer": "7" if c == "+" else "8", "reasoning": TEXTS[i], "num_tokens": 3 + i,
         "reward": 1.6 if c == "+" else 0.4, "correct": c == "+", "arm_name": f"wolfram_{i}"}
        for i, c in enumerate(correct)
    ]  # fmt: skip
    return {"question": question, "gold_answer": "so\n#### 7", "trajectories": trajectories}


def build(folder: Path, rows: list[dict[str, Any]], *options: str) -> subprocess.CompletedProcess[str]:
    (folder / "data").mkdir(exist_ok=True)
    (folder / "data" / "abel_regime_w_rollouts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    argv = [sys.executable, str(ROOT / "recipes" / "regime_w" / "build_preferences_abel.py"), *options]
    return subprocess.run(argv, cwd=folder, capture_output=True, text=True, check=False)


def test_the_originals_fields_and_its_pairs_when_asked(tmp_path: Path) -> None:
    done = build(tmp_path, [row("a", "++--"), row("b", "+++-")], "--all_pairs")
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "data" / "abel_coherence_preferences.jsonl").read_text().splitlines()
    assert len(lines) == 2 * 2 + 3 * 1 and "Total pairs: 7" in done.stdout
    first = json.loads(lines[0])
    assert set(first) == {
        "question", "gold_answer", "chosen", "rejected", "chosen_reward", "rejected_reward", "pair_type",
    }  # fmt: skip
    assert (first["gold_answer"], first["pair_type"], first["chosen_reward"]) == ("so\n#### 7", "correctness", 1.6)
    assert build(tmp_path, [row("a", "++--")]).stdout.count("Correctness pairs: 2") == 1


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([row("a", "++++")], "pairs: not one to train on"),
        ([{"question": "a", "gold_answer": "1", "trajectory": []}], "jsonl:1: field 'trajectories' is missing"),
        ([row("a", "+-"), row("a", "+-")], "jsonl:2: the question 'a' is there twice"),
        ([{**row("a", "+-"), "trajectories": [{"full_text": "x"}]}], "trajectory 0: field 'answer' is missing"),
    ],
)
def test_nothing_to_write_is_an_error_and_no_file(tmp_path: Path, rows: list[dict[str, Any]], said: str) -> None:
    done = build(tmp_path, rows)
    assert done.returncode == 2 and said in done.stderr
    assert not (tmp_path / "data" / "abel_coherence_preferences.jsonl").exists()
