"""Pictures through the main job as a user runs it: the drawn data set, DoRA and a trained tower, three rates, proved
versions, and a parity gate that looks at a picture."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from real_engine import run_values
from vision_models import needs_whole_pictures, save_vision_model

pytestmark = [needs_whole_pictures, pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(600)]
ROOT = Path(__file__).parents[2]
NUM_STEPS = 3
TOLERANCE = 0.15 if torch.cuda.is_available() else 1e-4


def test_a_run_over_pictures_from_start_to_report(tmp_path: Path) -> None:
    rows = tmp_path / "rows"
    argv = [sys.executable, str(ROOT / "scripts/summary_dataset.py"), str(rows), "--train", "24", "--heldout", "4"]
    subprocess.run(argv, check=True)
    values = run_values(save_vision_model("idefics3", tmp_path / "model"), tmp_path / "run")
    values["run"]["num_steps"] = NUM_STEPS
    lora = {"rank": 4, "dora": True}
    parts = {"aligner": "adapted", "vision": "trained"}
    values["model"] |= {"max_length": 320, "lora": lora, "parts": parts}
    args = {
        "path": str(rows / "train.jsonl"),
        "heldout_path": str(rows / "heldout.jsonl"),
        "schema": str(rows / "schema.json"),
        "weights": {"format": 1.0, "attr_key_recall": 2.0, "schema_tree": 1.0},
    }
    values["environments"] = [{"task": "even_summaries:EvenSummaries", "args": args}]
    rates = {"learning_rate": 1e-3, "aligner_learning_rate": 5e-4, "vision_learning_rate": 2e-4}
    values["learner"] = {"token_budget": 512, "optimizer": rates, "loss": {"kl_coef": 0.01}}
    values["parity"] |= {"interval": 2, "images": [str(rows / "images/heldout-00000.png")]}
    values["evaluation"] = {"num_tasks": 4}
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(values))
    path = os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    argv = [sys.executable, "-m", "syncline", "run", str(file)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=500, env=os.environ | {"PYTHONPATH": path})
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

    folder = tmp_path / "run"
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == list(range(1, NUM_STEPS + 1))
    assert all(step["sampling/sampling_logp_difference/mean"] < TOLERANCE for step in steps), "by other weights"
    assert steps[1]["parity/mean_abs_diff"] < TOLERANCE
    assert all(step["grad_norm"] > 0 for step in steps)
    assert steps[-1]["kl"] > 0
    summary = json.loads((folder / "summary.json").read_text())
    assert isinstance(summary["heldout_after"], int | float)
