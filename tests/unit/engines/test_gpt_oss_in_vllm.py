"""vLLM's own GPT-OSS with an MXFP4 base, beside the learner's: one base, one adapter, the same numbers."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gpt_oss_models import needs_experts, recipe

pytest.importorskip("vllm")


@needs_experts
@pytest.mark.skipif(torch.cuda.is_available(), reason="there a real engine shows it: tests/contracts")
def test_base_and_adapter_are_the_learners_and_so_is_what_comes_of_them(tmp_path: Path) -> None:
    path = recipe("small_model").build(tmp_path / "model")
    script = Path(__file__).parents[2] / "gpt_oss_in_vllm.py"
    done = subprocess.run([sys.executable, str(script), str(path)], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["base"], found["cannot"], found["slots"]) == ([], [], [])
    assert len(found["repacked"]) == 2 * 6
    assert found["packed"] == [], "a later write in place would not reach them"
    assert found["experts"]["adapted"] < 0.02, "bfloat16's rounding"
    assert found["experts"]["base"] > 0.2, "the adapter changed nothing that could be seen"
