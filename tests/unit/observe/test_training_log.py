"""The log and the CSV that people and programs of TRL's scripts read."""

import csv
import logging
from pathlib import Path

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


def test_a_shared_engine_is_colocated(tmp_path: Path) -> None:
    values = VALUES | {"run": VALUES["run"] | {"dir": str(tmp_path)}, "bridge": {"name": "shared"}}
    TrainingLog(resolve(values), []).close()
    assert "use_vllm=True, vllm_mode=colocate" in (tmp_path / "training.log").read_text()


def test_every_completion_has_a_row(tmp_path: Path) -> None:
    sample = TrainingSample((1, 2), (False, True), (0.0, -1.0), (VersionSpan(0, 1, 2),))
    said = (Message("rendered", "<|start|>user"), Message("assistant", 'a "b"\n[2]'))
    rollout = Rollout((sample,), 0.5, RolloutStatus.COMPLETED, {"reward_fn": 0.5, "action": 2.0}, said)
    for step in (1, 2):
        sink = CompletionsCsv(tmp_path / "runs" / "completions.csv")
        sink.log_rollouts(step, [RolloutGroup("g", "thermal", 0, (rollout, rollout))], {})
        sink.close()
    with (tmp_path / "runs" / "completions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["1", "1", "2", "2"]
    assert rows[0] == {
        "step": "1",
        "micro_step": "0",
        "prompt": "<|start|>user",
        "completion": 'a "b"\n[2]',
        "action": "2",
        "reward": "0.5",
        "target_action": "",
        "parts": "reward_fn=0.5 action=2",
    }
