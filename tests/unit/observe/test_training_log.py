"""The log and the CSV that people and programs of TRL's scripts read."""

import csv
import json
import logging
from pathlib import Path

import pytest

from syncline.config import resolve
from syncline.observe.training_log import CompletionsCsv, TrainingLog
from syncline.types import Message, Rollout, RolloutGroup, RolloutStatus, TrainingSample, VersionSpan

VALUES = {
    "run": {"dir": "runs/x", "num_steps": 10, "groups_per_step": 4, "rollouts_per_group": 8},
    "model": {"path": "m"},
    "sampling": {"max_tokens": 16},
    "environments": [{"task": "arithmetic"}],
}


def test_the_log_tells_settings_steps_and_where_the_results_are(tmp_path: Path) -> None:
    config = resolve(VALUES | {"run": VALUES["run"] | {"dir": str(tmp_path)}})
    logging.getLogger().setLevel(logging.INFO)
    for _ in range(2):
        sink = TrainingLog(config, ["http://localhost:8000"])
        logging.getLogger("syncline.model").info("Loaded policy model dtype=torch.bfloat16")
        for step in (1, 2):
            sink.log(step, {"reward": 0.25, "completions/clipped_ratio": 0.5, "tokens/sampled": 100.0})
        sink.close()
        logging.getLogger("syncline.model").info("after its end")
    lines = (tmp_path / "training.log").read_text().splitlines()
    assert len(lines) == 2 * 7, "a resumed run appends"
    parts = [line.split(" | ", 3) for line in lines]
    assert {(level, name) for _, level, name, _ in parts} == {("INFO", "train_grpo_vllm"), ("INFO", "syncline.model")}
    generation = parts[1][3]
    assert generation.startswith("Generation config | use_vllm=True, vllm_mode=server | num_generations=8")
    assert "completions_per_update=32" in generation
    assert generation.endswith("vllm_base_url=http://localhost:8000")
    assert parts[2][3] == f"Starting training | total_steps=10 | output_dir={tmp_path}"
    assert "'completions/clipped_ratio': 0.5" in parts[4][3]
    assert "'num_tokens': 200, 'step': 2" in parts[5][3]
    assert parts[6][3] == f"Training artifacts saved to {tmp_path / 'checkpoints'}"


def test_a_resumed_run_goes_on_counting_tokens(tmp_path: Path) -> None:
    rows = [{"step": 1, "tokens/sampled": 100.0}, {"step": 2}, {"step": 3, "tokens/sampled": 7.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    logging.getLogger().setLevel(logging.INFO)
    sink = TrainingLog(resolve(VALUES | {"run": VALUES["run"] | {"dir": str(tmp_path)}}), [])
    sink.log(3, {"tokens/sampled": 7.0})
    sink.log(4, {"tokens/sampled": 1.0})
    sink.close()
    told = [line for line in (tmp_path / "training.log").read_text().splitlines() if "num_tokens" in line]
    assert [line.rpartition("'num_tokens': ")[2] for line in told] == ["107, 'step': 3}", "108, 'step': 4}"]


def test_a_shared_engine_is_colocated(tmp_path: Path) -> None:
    values = VALUES | {"run": VALUES["run"] | {"dir": str(tmp_path)}, "bridge": {"name": "shared"}}
    TrainingLog(resolve(values), []).close()
    assert "use_vllm=True, vllm_mode=colocate" in (tmp_path / "training.log").read_text()


SAMPLE = TrainingSample((1, 2), (False, True), (0.0, -1.0), (VersionSpan(0, 1, 2),))
SAID = (Message("rendered", "<|start|>user"), Message("assistant", 'a "b"\n[2]'))
ROLLOUT = Rollout((SAMPLE,), 0.5, RolloutStatus.COMPLETED, {"reward_fn": 0.5, "action": 2.0}, SAID)


def write_rows(path: Path, *steps: int, resumed_step: int) -> list[dict[str, str]]:
    sink = CompletionsCsv(path, resumed_step=resumed_step)
    for step in steps:
        sink.log_rollouts(step, [RolloutGroup("g", "thermal", 0, (ROLLOUT, ROLLOUT))], {})
    sink.close()
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_completion_has_a_row(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "completions.csv"
    write_rows(path, 1, resumed_step=0)
    rows = write_rows(path, 2, resumed_step=1)
    assert [row["step"] for row in rows] == ["1", "1", "2", "2"]
    assert rows[0] == {
        "step": "1",
        "micro_step": "0",
        "prompt": "<|start|>user",
        "completion": 'a "b"\n[2]',
        "reward": "0.5",
        "parts": "reward_fn=0.5 action=2",
    }


@pytest.mark.parametrize(("resumed_step", "steps"), [(2, "1122331122" + "33"), (0, "112233112233" + "33")])
def test_a_resumed_run_writes_no_row_twice_and_none_into_a_torn_one(
    tmp_path: Path, resumed_step: int, steps: str
) -> None:
    """An earlier run's rows stand before; a run that is not resumed takes none of another's away."""
    path = tmp_path / "completions.csv"
    for _ in range(2):
        write_rows(path, 1, 2, 3, resumed_step=0)
    path.write_bytes(path.read_bytes() + b'4,0,<|start|>user,"a ""b')
    rows = write_rows(path, 3, resumed_step=resumed_step)
    assert "".join(row["step"] for row in rows) == steps
    assert all(row["completion"] == 'a "b"\n[2]' for row in rows)
