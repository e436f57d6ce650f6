"""What the GSM8K benchmark trains on, and how it counts what a kill left."""

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

from syncline.offline.questions import Question

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"


@pytest.fixture
def model_program(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("gsm8k_model")


@pytest.fixture
def program(model_program: ModuleType) -> ModuleType:
    return importlib.import_module("offline_gsm8k")


def test_a_worked_answer_ends_as_the_prompt_asks(model_program: ModuleType) -> None:
    solution = "She sold 48/2 = <<48/2=24>>24 in May.\nTogether 48+24 = <<48+24=72>>72.\n#### 72"
    answer = model_program.worked_answer(Question("?", solution))
    assert answer == "She sold 48/2 = 24 in May.\nTogether 48+24 = 72.\nAnswer: 72"
    assert model_program.worked_answer(Question("12+7=", "19")) == "19", "a bare answer stays bare"


def test_only_answers_have_labels_and_every_row_is_in_one_batch(model_program: ModuleType) -> None:
    rows = [([1] * n, [10 + n, 2]) for n in (5, 1, 3)]
    batches = list(model_program._batches(rows, 0, size=2))
    seen = sorted(ids[row][labels[row] != -100].tolist() for ids, labels in batches for row in range(len(ids)))
    assert seen == [[11, 2], [13, 2], [15, 2]]
    assert sorted(ids.shape for ids, _ in batches) == [(1, 7), (2, 5)], "the two shortest together"
    assert all(torch.equal(ids[labels != -100], labels[labels != -100]) for ids, labels in batches)


def test_what_a_kill_left_is_counted(program: ModuleType, tmp_path: Path) -> None:
    lines = [json.dumps({"key": key}).encode() + b"\n" for key in "abcb"]
    attempts = tmp_path / "attempts.jsonl"
    attempts.write_bytes(b"".join(lines))
    facts = {"resumed": 2, "sampled": 2, "sampled_again": 0, "tokens_per_second": 1234.5, "gpu_busy": None}
    kept, again, rate = program.counted(b"".join(lines[:2]), attempts, facts)
    assert kept == "called again: 2 kept (byte for byte), 2 sampled, 4 in all"
    assert again.startswith("twice: 1;")
    assert rate == "after the kill 1,234 tokens/s, GPU busy not known"
    assert "CHANGED" in program.counted(lines[1], attempts, facts)[0]


def test_the_table_says_what_is_known(program: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    found = program.Found()
    found.lines["Collecting"] = ["4000 trajectories"]
    with pytest.raises(program.OutOfTime), found.phase("collect"):
        raise program.OutOfTime("the deadline")
    told = "\n".join(found.table())
    assert "4000 trajectories" in told and "collect 0" in told
    assert "collect …" in capsys.readouterr().out
