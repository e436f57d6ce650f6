"""The GPT-OSS run as a user starts it, in small: stopped by Ctrl-C in the middle, resumed, to its end.

With an MXFP4 base in a real vLLM, the thermal storage task, adapters of attention and experts through `lora`.
"""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from gpt_oss_models import needs_experts, recipe

pytestmark = [needs_experts, pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(900)]
CONFIG = Path(__file__).parents[2] / "configs" / "gpt_oss_small.yaml"
NUM_STEPS = 4
VARIED = "even_tokens:EvenTokens"
"""A random model never names an action: the other environment's rewards differ, so that there is a gradient."""
PATH = os.pathsep.join([str(CONFIG.parents[1] / "benchmarks"), os.environ.get("PYTHONPATH", "")])


def arguments(folder: Path) -> list[str]:
    model = recipe("small_model").build(folder / "model")
    data = folder / "data"
    subprocess.run([sys.executable, recipe("thermal_data").__file__, "--out", str(data)], check=True)
    fields = [
        f"run.dir={folder / 'run'}",
        f"run.num_steps={NUM_STEPS}",
        f"model.path={model}",
        f"environments=[{{task: thermal_storage, args: {{path: {data}, invalid_reward: -0.5}}}}, {{task: {VARIED}}}]",
        f"observe.completions_csv={folder / 'completions.csv'}",
        "parity.max_mean_abs_diff=0.15",
        "parity.max_k3_kl=0.05",
    ]
    if torch.cuda.is_available():
        fields += ["engine.extra={kv_cache_memory_bytes: 1073741824}", "engine.gpu_memory_utilization=0.2"]
    return [sys.executable, "-m", "syncline", "run", str(CONFIG), *fields]


def test_a_run_is_stopped_resumed_and_ends(tmp_path: Path) -> None:
    argv, run = arguments(tmp_path), tmp_path / "run"
    with (tmp_path / "out").open("w") as out:
        environment = os.environ | {"PYTHONPATH": PATH}
        first = subprocess.Popen(argv, stdout=out, stderr=out, start_new_session=True, env=environment)
        deadline = time.monotonic() + 400
        while not ((run / "metrics.jsonl").exists() and (run / "metrics.jsonl").read_text()):
            assert first.poll() is None and time.monotonic() < deadline, (tmp_path / "out").read_text()[-4000:]
            time.sleep(0.2)
        os.kill(first.pid, signal.SIGINT)
        assert first.wait(120) == 130, (tmp_path / "out").read_text()[-4000:]
    stopped_at = len((run / "metrics.jsonl").read_text().splitlines())
    [checkpoint] = (run / "checkpoints").glob("step-*")
    assert checkpoint.name.endswith(f"{stopped_at:06d}"), "its last step is saved"
    assert (checkpoint / "adapter_model.safetensors").exists()
    done = subprocess.run([*argv, "--resume"], capture_output=True, text=True, timeout=450, env=environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [step["policy_version"] for step in steps] == list(range(1, NUM_STEPS + 1))
    assert all("completions/clipped_ratio" in step and "reward" in step for step in steps)
    assert all(step["parity/mean_abs_diff"] < 0.15 for step in steps)
    assert any(step.get("grad_norm", 0) > 0 for step in steps)
    log = (run / "training.log").read_text()
    for told in (
        "LoRA target parameters enumerated (4)",
        "Trainable LoRA parameters (24)",
        "Generation config | use_vllm=True, vllm_mode=server",
        "'completions/clipped_ratio'",
        "micro-batch 0:",
        "attention:",
        "Training artifacts saved to",
    ):
        assert told in log, told
    with (tmp_path / "completions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["step"] for row in rows} >= {str(step) for step in range(1, NUM_STEPS + 1)}
    assert any(row["prompt"].startswith("<|start|>system") for row in rows)
