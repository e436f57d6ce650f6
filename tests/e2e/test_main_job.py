"""The main job as a user runs it: one command, real processes, a real vLLM, every bridge; LoRA with a reference, and
one copy split over the ranks of each side."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from packed_models import make_packed_model
from real_engine import make_tiny_model, run_values

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]
NUM_STEPS = 4
DEVICE, TOLERANCE = ("cuda", 0.15) if torch.cuda.is_available() else ("cpu", 1e-4)
"""Of the mean |Δlogprob|, in bfloat16 and in float32."""
PACKED_TOLERANCE = 0.05
"""The parity gate's own: a packed base is computed with in bfloat16."""
OWN_ENVIRONMENT = Path(__file__).parents[2] / "benchmarks"
"""A user's own environment, by import path. Its reward varies in every group, so that every step has a gradient."""


NUM_GPUS = {"broadcast-lora": 2, "shared-tp2": 2, "shared-tp4": 4, "broadcast-fsdp2": 3}
"""GPUs that a variant needs, where it needs more than one."""
VARIANTS = (
    "restart",
    "restart-lora",
    "shared",
    "shared-lora",
    "lora",
    "lora-gptq",
    "broadcast-lora",
    "broadcast-fsdp2",
    "shared-tp2",
    "shared-tp4",
)
"""The bridge and what it has beside: `broadcast-lora` moves merged adapters, which the other bridges do not."""
BEHIND = "restart-lora"
"""It samples while it learns, up to a version behind; the others take turns."""
IN_EVERY_RUN = ("restart-lora", "shared", "broadcast-lora")
"""The parts of the others are in every run too, by other tests."""


def variants() -> list[Any]:
    found = torch.cuda.device_count()
    return [
        pytest.param(
            variant,
            marks=[
                pytest.mark.skipif(0 < found < gpus, reason=f"needs {gpus} GPUs"),
                *([] if variant in IN_EVERY_RUN else [pytest.mark.slow]),
            ],
        )
        for variant in VARIANTS
        for gpus in [NUM_GPUS.get(variant, 1)]
    ]


def values_of(variant: str, folder: Path) -> dict[str, Any]:
    values = run_values(make_tiny_model(folder / "model"), folder / "run", evaluation={"num_tasks": 8})
    bridge, _, beside = variant.partition("-")
    behind = int(variant == BEHIND)
    values["run"] |= {"num_steps": NUM_STEPS, "max_staleness": behind, "max_refills": 2 * behind}
    values["environments"] = [{"task": "even_tokens:EvenTokens", "name": "even"}]
    values["learner"] = {"token_budget": 512, "optimizer": {"learning_rate": 1e-3}}
    values["parity"]["interval"] = 2
    values["bridge"] = {"name": bridge}
    if "lora" in (bridge, beside):
        values["model"]["lora"] = {"rank": 4}
        values["learner"]["loss"] = {"name": "dapo", "kl_coef": 0.01}
    if bridge == "broadcast":
        values["bridge"] |= {"bucket_bytes": 200_000}
        values["engine"]["devices"] = [1]
    if beside == "gptq":
        make_packed_model(folder / "model", "gptq")
        values["model"]["dtype"] = "bfloat16"
    if beside == "fsdp2":
        values["learner"] |= {"device": DEVICE, "devices": [0, 2], "data_parallel_size": 2, "loss": {"name": "bnpo"}}
        values["engine"]["device"] = DEVICE
    if beside.startswith("tp"):
        split = {"device": DEVICE, "devices": list(range(NUM_GPUS[variant])), "tensor_parallel_size": NUM_GPUS[variant]}
        for section in ("engine", "learner"):
            values[section] |= split
    return values


@pytest.mark.parametrize("variant", variants())
def test_a_run_from_start_to_report(tmp_path: Path, variant: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(values_of(variant, tmp_path)))
    argv = [sys.executable, "-m", "syncline", "run", str(file)]
    path = os.pathsep.join([str(OWN_ENVIRONMENT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(argv, capture_output=True, text=True, timeout=500, env=os.environ | {"PYTHONPATH": path})
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

    folder = tmp_path / "run"
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == list(range(1, NUM_STEPS + 1))
    assert all(step["policy_version"] == step["step"] for step in steps)
    behind = int(variant == BEHIND)
    assert max(step["sample/staleness_max"] for step in steps) == behind
    tolerance = max(TOLERANCE, PACKED_TOLERANCE) if variant == "lora-gptq" else TOLERANCE
    on_policy = [step for step in steps if step["sample/staleness_max"] == 0]
    assert len(on_policy) == NUM_STEPS or behind
    assert all(step["sampling/sampling_logp_difference/mean"] < tolerance for step in on_policy), "by other weights"
    assert steps[1]["parity/mean_abs_diff"] < tolerance
    assert all(step["grad_norm"] > 0 for step in steps)
    assert ("kl" in steps[-1]) == ("lora" in variant)
    assert (steps[-1]["sync/bytes"] == 0) == (variant in ("shared", "shared-tp2", "shared-tp4"))
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["steps"] == NUM_STEPS
    assert summary["engine"]["name"] == "vllm"
    for key in ("reward_first", "reward_last", "heldout_before", "heldout_after", "train_seconds"):
        assert isinstance(summary[key], int | float), key
    page = (folder / "report.html").read_text()
    assert "data:image/png;base64," in page
    assert "http://" not in page.replace("http://127.0.0.1", "")
