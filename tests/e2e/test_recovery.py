"""`kill -9` of every process of a run in turn: noticed, named, cleanly stopped, resumed, nothing lost or doubled."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import yaml
from real_engine import make_tiny_model, run_values

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]
NUM_STEPS = 400
"""More than the test waits for: every run but the last is killed."""
DETECT_SECONDS = 5.0


class Run:
    """One run folder, started and resumed as a user would."""

    def __init__(self, folder: Path) -> None:
        model = make_tiny_model(folder / "model")
        values = run_values(model, folder / "run")
        values["run"] |= {"num_steps": NUM_STEPS, "groups_per_step": 2, "rollouts_per_group": 2}
        values["environments"] = [{"task": "arithmetic", "args": {"weights": {"digits": 1.0}}}]
        values["learner"] = {"token_budget": 512, "checkpoint_interval": 3}
        self.folder = folder / "run"
        self.file = folder / "run.yaml"
        self.file.write_text(yaml.safe_dump(values))
        self.output = folder / "output.txt"
        self.process: subprocess.Popen | None = None

    def start(self, *options: str) -> None:
        argv = [sys.executable, "-m", "syncline", "run", str(self.file), *options]
        with self.output.open("w") as output:
            self.process = subprocess.Popen(argv, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)

    def wait_for_step(self, step: int) -> None:
        deadline = time.monotonic() + 180
        while self.last_step() < step:
            assert self.process is not None
            assert self.process.poll() is None, f"the run ended early:\n{self.output.read_text()[-3000:]}"
            assert time.monotonic() < deadline, f"no step {step} in time:\n{self.output.read_text()[-3000:]}"
            time.sleep(0.1)

    def last_step(self) -> int:
        metrics = self.folder / "metrics.jsonl"
        lines = metrics.read_text().splitlines() if metrics.exists() else []
        return json.loads(lines[-1])["step"] if lines else 0

    def pids(self) -> dict[str, int]:
        found = json.loads((self.folder / "processes.json").read_text())
        return {entry["name"]: entry["pid"] for entry in found["processes"]}

    def wait_for_exit(self, *, seconds: float) -> int:
        assert self.process is not None
        return self.process.wait(seconds)

    def tickets(self) -> list[tuple[int, str, int | None]]:
        """(task_index, state, step) of every attempt the trajectory server remembers."""
        with sqlite3.connect(f"file:{self.folder}/trajectories.sqlite?mode=ro", uri=True) as store:
            return list(store.execute("SELECT task_index, state, step FROM tickets"))


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def _assert_gone(pids: dict[str, int]) -> None:
    deadline = time.monotonic() + 20
    while alive := {name: pid for name, pid in pids.items() if _alive(pid)}:
        assert time.monotonic() < deadline, f"still running: {alive}"
        time.sleep(0.1)


@pytest.fixture
def run(tmp_path: Path):
    run = Run(tmp_path)
    yield run
    if run.process is not None and run.process.poll() is None:
        run.process.send_signal(signal.SIGTERM)
        run.process.wait(60)


def test_every_process_killed_in_turn(run: Run) -> None:
    run.start()
    step = 0
    for victim in ("trajectories", "engine", "env:arithmetic", "learner"):
        run.wait_for_step(step + 5)
        pids = run.pids()
        killed_at = time.monotonic()
        os.kill(pids[victim], signal.SIGKILL)
        _wait_until_named(run, victim, deadline=killed_at + DETECT_SECONDS)
        assert run.wait_for_exit(seconds=60) != 0
        _assert_gone(pids)
        step = run.last_step()
        run.start("--resume")
    run.wait_for_step(step + 5)
    pids = run.pids()
    assert run.process is not None
    os.kill(run.process.pid, signal.SIGKILL)
    _assert_gone(pids)
    step = run.last_step()
    run.start("--resume", f"run.num_steps={step + 6}")
    assert run.wait_for_exit(seconds=240) == 0, run.output.read_text()[-3000:]
    _assert_nothing_lost_or_doubled(run, num_steps=step + 6)


def _wait_until_named(run: Run, victim: str, *, deadline: float) -> None:
    while True:
        text = run.output.read_text()
        if f"{victim} " in text and "SIGKILL" in text:
            return
        assert time.monotonic() < deadline, f"{victim} was not named within {DETECT_SECONDS} s:\n{text[-2000:]}"
        time.sleep(0.05)


def _assert_nothing_lost_or_doubled(run: Run, *, num_steps: int) -> None:
    steps = [json.loads(line)["step"] for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, num_steps + 1)), "a step is missing from the surviving lineage, or in it twice"
    trained = [(index, step) for index, state, step in run.tickets() if state == "trained"]
    assert Counter(step for _, step in trained) == dict.fromkeys(range(1, num_steps + 1), 2), "a step lacks groups"
    indices = sorted(index for index, _ in trained)
    assert indices == list(range(len(indices))), f"a task was lost, or trained on twice: {sorted(run.tickets())}"
