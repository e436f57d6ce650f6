"""A real learner killed in the middle of a step and resumed, beside one that nothing happened to.

Both learn from the same recorded rollouts, which come from a real trajectory server; everything else is the learner's
own. Answers grow from step to step, so that whatever a process settles at its first batch, such as kernels compiled for
it, the resumed one settles at another batch. Each process has its own cache of kernels, as on another machine.
"""

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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from real_engine import run_values
from safetensors.torch import load_file
from trajectory_process import TrajectoryProcess

from syncline.trajectory.client import TrajectorySink, TrajectorySource
from syncline.types import Completion, FinishReason, Rollout, RolloutGroup, RolloutStatus, TrainingSample, VersionSpan

NUM_STEPS, GROUPS_PER_STEP, HANGS_AT = 5, 2, 4
DEADLINE_SECONDS = 240.0
"""Of a process, which on a GPU compiles its layers first."""
LAST_STEP = f"step-{NUM_STEPS:06d}"


@dataclass(frozen=True, slots=True)
class Kind:
    """Sections of the run's configuration, and what the recorded answers are like."""

    model: dict[str, Any] = field(default_factory=dict)
    learner: dict[str, Any] = field(default_factory=dict)
    device: str = "cpu"
    max_length: int = 128
    growth: int = 0
    """Tokens by which a group's longest answer may be longer than the one's before."""

    @property
    def num_ranks(self) -> int:
        return self.learner.get("data_parallel_size", 1)


@dataclass(frozen=True, slots=True)
class Learned:
    steps: list[tuple[float, float]]
    """Loss and gradient norm of each."""
    held: dict[str, Any]
    """Weights, optimizer and random states in the last checkpoint: see `held_in`."""


def whole_and_resumed(kind: Kind, model: Path, folder: Path) -> tuple[Learned, Learned]:
    """What an uninterrupted learner has learned, and one that was killed with `kill -9` in step `HANGS_AT`.

    Of several ranks the last is killed. Raises `AssertionError` with what a process told that ended otherwise.
    """
    whole, cut = (_config_file(kind, model, folder / name) for name in ("whole", "cut"))
    with _filled_server(kind, folder / "server-of-whole") as url, _started(whole, url) as uninterrupted:
        with _filled_server(kind, folder / "server-of-cut") as cut_url:
            with _started(cut, cut_url, str(HANGS_AT)) as first:
                _kill_when_it_hangs(first, cut.parent / "run", num_ranks=kind.num_ranks)
                code, told = first.ended()
            assert code in (-signal.SIGKILL, 128 + signal.SIGKILL), told
            assert kind.num_ranks == 1 or f"learner rank {kind.num_ranks - 1} of {kind.num_ranks} (pid " in told
            with _started(cut, cut_url) as second:
                code, told = second.ended()
            assert code == 0, told
        code, told = uninterrupted.ended()
        assert code == 0, told
    return _learned(whole.parent / "run"), _learned(cut.parent / "run")


def recorded_group(kind: Kind, index: int) -> RolloutGroup:
    """The `index`-th of all: two answers, of which the second is rewarded."""
    drawn, growth = random.Random(index), index * kind.growth
    rollouts = []
    for attempt in range(2):
        answer = tuple(drawn.randrange(3, 40) for _ in range(drawn.randrange(2 + growth // 2, 12 + growth)))
        logprobs = tuple(drawn.uniform(-5, -2) for _ in answer)
        completion = Completion(answer, logprobs, (VersionSpan(0, 0, len(answer)),), FinishReason.STOP)
        sample = TrainingSample.from_completion((5, 6, 7 + index), completion)
        rollouts.append(Rollout((sample,), float(attempt), RolloutStatus.COMPLETED))
    return RolloutGroup(f"math-{index}", "math", index, tuple(rollouts))


@contextmanager
def _filled_server(kind: Kind, folder: Path) -> Iterator[str]:
    folder.mkdir()
    server = TrajectoryProcess(folder, groups_per_step=GROUPS_PER_STEP, max_staleness=NUM_STEPS)
    try:
        server.wait_until_ready()
        asyncio.run(_fill(kind, server.url))
        yield server.url
    finally:
        server.kill()


async def _fill(kind: Kind, url: str) -> None:
    with TrajectorySource(url, wait_timeout_seconds=30.0) as source:
        source.start(policy_version=0, step=0)
    async with TrajectorySink(url, worker="recorder") as sink:
        for permit in await sink.permits("math", NUM_STEPS * GROUPS_PER_STEP, timeout_seconds=10.0):
            await sink.put(recorded_group(kind, permit.task_index), permit)


def _config_file(kind: Kind, model: Path, folder: Path) -> Path:
    values = run_values(model, folder / "run")
    values["run"] |= {
        "num_steps": NUM_STEPS,
        "groups_per_step": GROUPS_PER_STEP,
        "max_staleness": NUM_STEPS,
        "deterministic": True,
    }
    values["model"] |= {"max_length": kind.max_length} | kind.model
    values["learner"] = {
        "device": kind.device,
        "devices": list(range(kind.num_ranks)),
        "token_budget": 4 * kind.max_length if kind.growth else kind.max_length,
        "checkpoint_interval": 2,
        "optimizer": {"learning_rate": 1e-3},
    } | kind.learner
    values["engine"]["device"] = kind.device
    (folder / "run").mkdir(parents=True)
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


@dataclass(frozen=True, slots=True)
class _Process:
    process: subprocess.Popen[bytes]
    log: Path

    def ended(self) -> tuple[int, str]:
        """Exit code, and what it told."""
        code = self.process.wait(DEADLINE_SECONDS)
        return code, self.log.read_text()[-10_000:]


@contextmanager
def _started(file: Path, url: str, *hangs_at: str) -> Iterator[_Process]:
    number = len(list(file.parent.glob("*.log")))
    log, kernels = file.with_name(f"learner-{number}.log"), file.with_name(f"kernels-{number}")
    own = {"PYTHONPATH": os.pathsep.join(sys.path), "TORCHINDUCTOR_CACHE_DIR": str(kernels)}
    argv = [sys.executable, "-m", "recorded_learner", str(file), url, *hangs_at]
    with log.open("w") as told:
        process = subprocess.Popen(argv, stdout=told, stderr=told, env=os.environ | own)
    try:
        yield _Process(process, log)
    finally:
        process.kill()
        process.wait()


def _kill_when_it_hangs(learner: _Process, folder: Path, *, num_ranks: int) -> None:
    """The last rank: of one process, the learner itself."""
    paths, deadline = [folder / f"hangs-{rank}" for rank in range(num_ranks)], time.monotonic() + DEADLINE_SECONDS
    while not all(path.exists() and path.read_text() for path in paths):
        assert learner.process.poll() is None, learner.ended()[1]
        assert time.monotonic() < deadline, f"no rank came to the step it hangs in: {learner.log.read_text()}"
        time.sleep(0.1)
    os.kill(int(paths[-1].read_text()), signal.SIGKILL)


def _learned(folder: Path) -> Learned:
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == list(range(1, NUM_STEPS + 1))
    return Learned([(step["loss"], step["grad_norm"]) for step in steps], held_in(folder / "checkpoints" / LAST_STEP))


def held_in(checkpoint: Path) -> dict[str, Any]:
    """The state, and by file and name a digest of every tensor."""
    held: dict[str, Any] = {"state": json.loads((checkpoint / "state.json").read_text())}
    for path in checkpoint.glob("*.safetensors"):
        for name, tensor in load_file(path).items():
            bits = tensor.contiguous().view(-1).view(torch.uint8)
            held[f"{path.name} {name}"] = hashlib.sha256(bits.numpy().tobytes()).hexdigest()
    return held
