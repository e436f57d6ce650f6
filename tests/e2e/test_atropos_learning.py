"""An environment of the real `atroposlib`, unchanged, trains a model through us: `syncline run` with no environment of
its own, and the reward rises."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import pytest
import yaml
from real_engine import free_port, make_tiny_model, run_values
from transformers import AutoTokenizer

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(900)]
ENVIRONMENT = Path(__file__).parents[1] / "atropos_environment.py"
NUM_STEPS = 14


@contextmanager
def process(*argv: str, log: Path) -> Iterator[subprocess.Popen]:
    """Ended by pid, and whatever it started with it."""
    with log.open("w") as file:
        child = subprocess.Popen(
            [sys.executable, *argv], cwd=log.parent, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        yield child
    finally:
        child.terminate()
        with suppress(subprocess.TimeoutExpired):
            child.wait(30)
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        print(f"--- {log.name}\n{log.read_text()[-4000:]}")


def wait_for(url: str, run: subprocess.Popen) -> None:
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline and run.poll() is None:
        with suppress(httpx.TransportError):
            if httpx.get(url).status_code == 200:
                return
        time.sleep(0.2)
    raise AssertionError(f"{url} does not answer")


def test_an_environment_of_theirs_trains_a_model_through_us(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    tokenizer.save_pretrained(model)
    values = run_values(model, tmp_path / "run", environments=[])
    values["run"] |= {"num_steps": NUM_STEPS, "groups_per_step": 4, "rollouts_per_group": 8, "max_staleness": 1}
    values["learner"] = {
        "unrecorded": "accept",
        "token_budget": 2048,
        "optimizer": {"learning_rate": 1e-3, "schedule": "constant"},
    }
    values["engine"]["port"] = free_port()
    values["trajectory"] = {"port": free_port()}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    engine = f"http://127.0.0.1:{values['engine']['port']}"
    trajectories = f"http://127.0.0.1:{values['trajectory']['port']}"
    with process("-m", "syncline", "run", "run.yaml", log=tmp_path / "run.log") as run:
        wait_for(f"{engine}/health", run)
        options = ["--env.rollout_server_url", trajectories, "--openai.base_url", f"{engine}/v1"]
        options += ["--openai.model_name", str(model), "--openai.api_key", "x", "--openai.server_type", "vllm"]
        options += ["--env.tokenizer_name", str(model), "--env.use_wandb", "False", "--env.group_size", "8"]
        with process(str(ENVIRONMENT), "serve", *options, log=tmp_path / "environment.log"):
            assert run.wait(600) == 0
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [step["policy_version"] for step in steps] == list(range(1, NUM_STEPS + 1))
    rewards = [step["reward"] for step in steps]
    first, last = sum(rewards[:3]) / 3, sum(rewards[-3:]) / 3
    print(f"reward {first:.3f} -> {last:.3f}")
    assert last > first + 0.2
