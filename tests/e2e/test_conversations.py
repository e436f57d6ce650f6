"""Conversations of several turns, trained on: what the learner scores is, token for token, what vLLM sampled.

The sampler's log-probabilities are of sampled tokens in the context they were sampled in. One token of the history
tokenized otherwise, or one masked wrongly, and the learner's differ from them.
"""

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
TEMPLATE = (
    "{% for m in messages %}{{ m.role }} {{ m.content | trim }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)
"""It trims: an answer that begins or ends in a space begins a new sample, any other goes on with the same."""
DIFFERENCE, TOLERANCE = ("mean", 0.15) if torch.cuda.is_available() else ("max", 1e-3)
"""Of |Δlogprob|: in bfloat16 single tokens of a random model differ by more."""


def test_a_run_of_conversations(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "model")
    (model / "chat_template.jinja").write_text(TEMPLATE)
    values = run_values(model, tmp_path / "run")
    values["model"] |= {"max_length": 400}
    values["run"] |= {"num_steps": 2}
    values["sampling"] = {"max_tokens": 100}
    values["environments"] = [{"task": "talkative_environment:Talkative", "name": "talk"}]
    values["learner"] = {"token_budget": 1024, "optimizer": {"learning_rate": 1e-3}}
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(values))
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    argv = [sys.executable, "-m", "syncline", "run", str(file)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=500, env=os.environ | {"PYTHONPATH": path})
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(steps) == 2 and all(step["grad_norm"] > 0 for step in steps)
    assert all(step[f"sampling/sampling_logp_difference/{DIFFERENCE}"] < TOLERANCE for step in steps), steps
    groups = [json.loads(line) for line in (tmp_path / "run" / "rollouts.jsonl").read_text().splitlines()]
    said = [rollout["completion"] for group in groups for rollout in group["rollouts"]]
    assert any(text.count("[assistant]") > 1 for text in said), "no conversation had a second turn"
    assert {m["content"].split()[0] for group in groups for m in group["prompt"]} == {"tell"}
