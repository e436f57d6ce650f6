"""A learner started apart finds a real engine's weights by `vllm_bridge_config.json`, trains on them, and refuses the
file once the engine is gone."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import yaml
from real_engine import free_port, make_tiny_model, run_values, running_engine

from syncline.bridges.bridge_file import FILE_NAME
from syncline.errors import SyncError

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]
NUM_STEPS = 2


def verb(*words: str) -> list[str]:
    return [sys.executable, "-m", "syncline", *words]


@contextmanager
def running(*words: str) -> Iterator[None]:
    """A service of the run; ended by pid."""
    process = subprocess.Popen(verb(*words), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.terminate()
        process.wait(30)


def test_a_learner_started_apart_trains_on_the_weights_of_the_engine_it_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOGDIR", str(tmp_path / "logs"))
    values = run_values(make_tiny_model(tmp_path / "model"), tmp_path / "run", bridge={"name": "shared"})
    values["run"] |= {"num_steps": NUM_STEPS, "groups_per_step": 2, "rollouts_per_group": 2}
    file = str(tmp_path / "run.yaml")
    Path(file).write_text(yaml.safe_dump(values))
    trajectories = f"http://127.0.0.1:{(port := free_port())}"
    train = verb("train", file, "--bridge-config", "auto", "--trajectories-url", trajectories)
    with running_engine(values, tmp_path, "--bridge-config", "auto") as engine, ExitStack() as services:
        path = tmp_path / "logs" / FILE_NAME
        told = f"Exported {json.loads(path.read_text())['num_params']} params to {path}"
        assert told in (tmp_path / "engine.log").read_text()
        services.enter_context(running("trajectories", file, "--port", str(port)))
        urls = ("--engine-url", engine.url, "--trajectories-url", trajectories)  # type: ignore[attr-defined]
        services.enter_context(running("env", file, "--index", "0", *urls))
        for first in (0, NUM_STEPS + 1):  # another life, whose checkpoints are lost, goes on above what was served
            done = subprocess.run(train, capture_output=True, text=True, timeout=300)
            assert done.returncode == 0, done.stderr[-3000:]
            steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
            published = [(step["step"], step["policy_version"], step["sync/bytes"]) for step in steps]
            assert published == [(1, first + 1, 0), (2, first + 2, 0)]
            assert engine.receipt().policy_version == first + NUM_STEPS
            shutil.rmtree(tmp_path / "run" / "checkpoints")
        assert "served version 2 already, and the weights resumed are those of 0: going on as 3" in done.stderr
        os.killpg(engine.process.pid, signal.SIGKILL)  # type: ignore[attr-defined]
        engine.process.wait(30)  # type: ignore[attr-defined]
        stale = subprocess.run(train, capture_output=True, text=True, timeout=300)
    assert stale.returncode == SyncError.exit_code
    assert f"{path}: the engine's weights cannot be shared: pid" in stale.stderr
    assert "is gone; start the engine again" in stale.stderr
