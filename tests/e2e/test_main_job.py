"""The main job as a user runs it: one command, real processes, a real vLLM, every bridge; LoRA with a reference, and
one copy split over two ranks of each side."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from real_engine import make_tiny_model, run_values

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]
NUM_STEPS = 4
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OWN_ENVIRONMENT = Path(__file__).parents[2] / "benchmarks"
"""A user's own environment, by import path. Its reward varies in every group, so that every step has a gradient."""


@pytest.mark.parametrize("tuning", ["full", "lora", "shared", "shared by ranks", "lora-shared", "broadcast"])
def test_a_run_from_start_to_report(tmp_path: Path, tuning: str) -> None:
    if tuning == "shared by ranks" and torch.cuda.device_count() == 1:
        pytest.skip("needs two GPUs, or none")
    model = make_tiny_model(tmp_path / "model")
    values = run_values(model, tmp_path / "run", evaluation={"num_tasks": 8})
    behind = int(tuning == "lora")  # that run samples while it learns; the others take turns
    values["run"] |= {"num_steps": NUM_STEPS, "max_staleness": behind, "max_refills": 2 * behind}
    values["environments"] = [{"task": "even_tokens:EvenTokens", "name": "even"}]
    values["learner"] = {"token_budget": 512, "optimizer": {"learning_rate": 1e-3}}
    values["parity"]["interval"] = 2
    if tuning.startswith("lora"):
        values["model"]["lora"] = {"rank": 4}
        values["learner"]["loss"] = {"name": "dapo", "kl_coef": 0.01}
    if tuning.endswith("shared") or tuning == "shared by ranks":
        values["bridge"] = {"name": "shared"}
    if tuning == "shared by ranks":
        for section in ("engine", "learner"):
            values[section] |= {"device": DEVICE, "devices": [0, 1], "tensor_parallel_size": 2}
    if tuning == "broadcast":  # of merged adapters, which the other bridges' runs do not move
        if torch.cuda.device_count() == 1:
            pytest.skip("NCCL broadcasts between two GPUs, and this machine has one")
        values["bridge"] = {"name": "broadcast", "bucket_bytes": 200_000}
        values["engine"]["devices"] = [1]
        values["model"]["lora"] = {"rank": 4}
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(values))
    argv = [sys.executable, "-m", "syncline", "run", str(file)]
    path = os.pathsep.join([str(OWN_ENVIRONMENT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(argv, capture_output=True, text=True, timeout=500, env=os.environ | {"PYTHONPATH": path})
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

    folder = tmp_path / "run"
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == list(range(1, NUM_STEPS + 1))
    assert all(step["policy_version"] == step["step"] for step in steps)
    assert max(step["sample/staleness_max"] for step in steps) == behind
    on_policy = [step for step in steps if step["sample/staleness_max"] == 0]
    assert len(on_policy) == NUM_STEPS or behind
    assert all(step["sampling/sampling_logp_difference/mean"] < 1e-4 for step in on_policy), "sampled by other weights"
    assert steps[1]["parity/mean_abs_diff"] < 1e-4
    assert all(step["grad_norm"] > 0 for step in steps)
    assert ("kl" in steps[-1]) == tuning.startswith("lora")
    assert (steps[-1]["sync/bytes"] == 0) == tuning.startswith("shared")
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["steps"] == NUM_STEPS
    assert summary["engine"]["name"] == "vllm"
    for key in ("reward_first", "reward_last", "heldout_before", "heldout_after", "train_seconds"):
        assert isinstance(summary[key], int | float), key
    page = (folder / "report.html").read_text()
    assert "data:image/png;base64," in page
    assert "http://" not in page.replace("http://127.0.0.1", "")
