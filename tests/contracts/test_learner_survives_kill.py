"""`kill -9` of a real learner in the middle of a step, and of one of its ranks: resumed, it takes the very same steps.

The same recorded rollouts come from a real trajectory server; everything else is the learner's own."""

import asyncio
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from real_engine import make_tiny_model, run_values
from safetensors.torch import load_file
from trajectory_process import TrajectoryProcess

from syncline.trajectory.client import TrajectorySink
from syncline.types import Completion, FinishReason, Rollout, RolloutGroup, RolloutStatus, TrainingSample, VersionSpan

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
NUM_STEPS, GROUPS_PER_STEP, HANGS_AT = 5, 2, 4
DEADLINE_SECONDS = 180.0
KINDS: dict[str, dict[str, Any]] = {
    "one process, dropout": {"model": {"lora": {"rank": 4, "dropout": 0.2}}, "learner": {}},
    "two ranks": {"model": {"dtype": "bfloat16"}, "learner": {"data_parallel_size": 2}},
    "two ranks, dropout": {
        "model": {"lora": {"rank": 4, "dropout": 0.2}},
        "learner": {"data_parallel_size": 2, "loss": {"name": "bnpo", "kl_coef": 0.05}},
    },
}


def recorded(index: int) -> RolloutGroup:
    drawn = random.Random(index)
    rollouts = []
    for attempt in range(2):
        answer = tuple(drawn.randrange(3, 40) for _ in range(drawn.randrange(2, 12)))
        logprobs = tuple(drawn.uniform(-5, -2) for _ in answer)
        completion = Completion(answer, logprobs, (VersionSpan(0, 0, len(answer)),), FinishReason.STOP)
        sample = TrainingSample.from_completion((5, 6, 7 + index), completion)
        rollouts.append(Rollout((sample,), float(attempt), RolloutStatus.COMPLETED))
    return RolloutGroup(f"math-{index}", "math", index, tuple(rollouts))


@contextmanager
def filled_server(folder: Path) -> Iterator[str]:
    folder.mkdir()
    server = TrajectoryProcess(folder, groups_per_step=GROUPS_PER_STEP, max_staleness=NUM_STEPS)
    try:
        server.wait_until_ready()
        asyncio.run(fill(server.url))
        yield server.url
    finally:
        server.kill()


async def fill(url: str) -> None:
    from syncline.trajectory.client import TrajectorySource

    with TrajectorySource(url, wait_timeout_seconds=30.0) as source:
        source.start(policy_version=0, step=0)
    async with TrajectorySink(url, worker="recorder") as sink:
        for permit in await sink.permits("math", NUM_STEPS * GROUPS_PER_STEP, timeout_seconds=10.0):
            await sink.put(recorded(permit.task_index), permit)


def config_file(kind: str, model: Path, folder: Path) -> Path:
    values = run_values(model, folder / "run")
    values["run"] |= {
        "num_steps": NUM_STEPS,
        "groups_per_step": GROUPS_PER_STEP,
        "max_staleness": NUM_STEPS,
        "deterministic": True,
    }
    values["model"] |= KINDS[kind]["model"]
    values["learner"] = {
        "device": "cpu",
        "token_budget": 128,
        "checkpoint_interval": 2,
        "optimizer": {"learning_rate": 1e-3},
    } | KINDS[kind]["learner"]
    values["engine"]["device"] = "cpu"
    (folder / "run").mkdir(parents=True)
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


def start(file: Path, url: str, *hangs_at: str) -> subprocess.Popen[str]:
    argv = [sys.executable, "-m", "recorded_learner", str(file), url, *hangs_at]
    return subprocess.Popen(argv, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    try:
        _, told = process.communicate(timeout=DEADLINE_SECONDS)
    finally:
        process.kill()
    return process.returncode, told


def kill_when_it_hangs(process: subprocess.Popen[str], folder: Path, *, num_ranks: int) -> None:
    """The last rank: of one process, the learner itself."""
    paths, deadline = [folder / f"hangs-{rank}" for rank in range(num_ranks)], time.monotonic() + DEADLINE_SECONDS
    while not all(path.exists() and path.read_text() for path in paths):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, "no rank came to the step it hangs in"
        time.sleep(0.1)
    os.kill(int(paths[-1].read_text()), signal.SIGKILL)


def what_it_learned(folder: Path) -> tuple[list[tuple[float, float]], dict[str, Any]]:
    """Loss and gradient norm of every step, and what the last checkpoint holds: weights, optimizer, random states."""
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == list(range(1, NUM_STEPS + 1))
    newest = folder / "checkpoints" / f"step-{NUM_STEPS:06d}"
    held: dict[str, Any] = {"state": json.loads((newest / "state.json").read_text())}
    for path in newest.glob("*.safetensors"):
        for name, tensor in load_file(path).items():
            bits = tensor.contiguous().view(-1).view(torch.uint8)
            held[f"{path.name} {name}"] = hashlib.sha256(bytes(bits.tolist())).hexdigest()
    return [(step["loss"], step["grad_norm"]) for step in steps], held


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_learner_goes_on_to_the_bit(tmp_path: Path, kind: str) -> None:
    model = make_tiny_model(tmp_path / "model")
    num_ranks = KINDS[kind]["learner"].get("data_parallel_size", 1)
    whole, cut = (config_file(kind, model, tmp_path / name) for name in ("whole", "cut"))
    with filled_server(tmp_path / "server-of-whole") as url:
        uninterrupted = start(whole, url)
        code, told = finish(uninterrupted)
        assert code == 0, told
    with filled_server(tmp_path / "server-of-cut") as url:
        first = start(cut, url, str(HANGS_AT))
        kill_when_it_hangs(first, cut.parent / "run", num_ranks=num_ranks)
        code, told = finish(first)
        assert code in (-signal.SIGKILL, 128 + signal.SIGKILL), told
        assert num_ranks == 1 or f"learner rank {num_ranks - 1} of {num_ranks} (pid " in told
        second = start(cut, url)
        code, told = finish(second)
        assert code == 0, told
    assert what_it_learned(cut.parent / "run") == what_it_learned(whole.parent / "run")
