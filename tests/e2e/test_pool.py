"""Two engines and a learner started apart, over `broadcast`: one is killed, the run goes on; it comes back, is proved,
and samples again."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from socket import create_server

import httpx
import pytest
import yaml
from real_engine import make_tiny_model, run_values

from syncline.engines.client import EngineController

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(900)]
NUM_STEPS = 4000
"""More than are taken while an engine starts: the tests end the run."""
DEADLINE_SECONDS = 240.0


def start(log: Path, *words: str) -> subprocess.Popen:
    with log.open("w") as output:
        command = [sys.executable, "-m", "syncline", *words]
        return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)


@contextmanager
def running(log: Path, *words: str) -> Iterator[subprocess.Popen]:
    """Ended by pid, as a user's Ctrl-C would."""
    process = start(log, *words)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


def wait_for(what, watched: dict[Path, subprocess.Popen]) -> None:
    """`watched`: whose end would make it wait in vain, by their logs."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not what():
        for log, process in watched.items():
            assert process.poll() is None, f"{log.name} ended early:\n{log.read_text()[-4000:]}"
        told = "\n".join(f"{log.name}:\n{log.read_text()[-4000:]}" for log in watched)
        assert time.monotonic() < deadline, f"in vain:\n{told}"
        time.sleep(0.2)


def steps_of(folder: Path) -> list[dict]:
    file = folder / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


@pytest.fixture
def values(tmp_path: Path) -> dict:
    values = run_values(make_tiny_model(tmp_path / "model"), tmp_path / "run")
    values["run"] |= {"num_steps": NUM_STEPS, "groups_per_step": 2, "rollouts_per_group": 2}
    values["environments"] = [{"task": "arithmetic", "args": {"weights": {"digits": 1.0}}}]
    values["engine"] |= {"device": "cpu", "num_replicas": 2, "port": free_pair()}
    values["learner"] = {"token_budget": 512, "device": "cpu"}
    values["bridge"] = {"name": "broadcast", "min_engines": 1}
    return values


def free_pair() -> int:
    """Two free ports, one after the other, below those that the system gives to connections."""
    while True:
        port = random.randrange(20000, 30000)
        with suppress(OSError), create_server(("127.0.0.1", port)), create_server(("127.0.0.1", port + 1)):
            return port


def test_an_engine_killed_under_a_run_comes_back_proved(values: dict, tmp_path: Path) -> None:
    file, run_log, servers_log = str(tmp_path / "run.yaml"), tmp_path / "run.txt", tmp_path / "servers.txt"
    Path(file).write_text(yaml.safe_dump(values))
    first_port = values["engine"]["port"]
    second = EngineController(f"http://127.0.0.1:{first_port + 1}", timeout_seconds=60)
    with (
        running(servers_log, "serve", "--config", file) as servers,
        running(run_log, "run", file, "--engines-apart") as run,
    ):
        folder, watched = tmp_path / "run", {servers_log: servers, run_log: run}
        wait_for(lambda: len(steps_of(folder)) >= 3, watched)
        assert steps_of(folder)[0]["sync/engines"] == 2
        recorded = json.loads((tmp_path / "run-servers" / "processes.json").read_text())["processes"]
        [pid] = [entry["pid"] for entry in recorded if entry["name"] == "engine-1"]
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: steps_of(folder)[-1]["sync/engines"] == 1, watched)
        wait_for(lambda: steps_of(folder)[-1]["sync/engines"] == 2, watched)
        back_at = steps_of(folder)[-1]
        assert second.receipt().policy_version >= back_at["policy_version"], "it holds what was published"
        wait_for(lambda: len(steps_of(folder)) >= back_at["step"] + 5, watched)
        steps = steps_of(folder)
        assert [step["step"] for step in steps] == list(range(1, len(steps) + 1)), "no step was lost"
        assert all(step["sample/staleness_max"] == 0 for step in steps), "nobody sampled under an older policy"
        wait_for(lambda: num_answered(second.url) > 0, watched)  # it samples again
    text = run_log.read_text() + (folder / "logs" / "learner.log").read_text()
    assert re.search(r"lost engine at http://127\.0\.0\.1:\d+; the run goes on with 1 of 2 engines", text)
    assert re.search(r"engine at http://127\.0\.0\.1:\d+ is back, 2 of 2 engines", text)
    assert "engine-1 (pid" in servers_log.read_text()
    assert "starting it again, 1 of 3" in servers_log.read_text()


def num_answered(url: str) -> float:
    """Requests that this process of the engine has finished, as vLLM counts them."""
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith("vllm:request_success_total{"))


def test_servers_fail_at_once_when_a_port_is_taken_and_name_its_holder(values: dict, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(values))
    port = values["engine"]["port"] + 1
    listen = f"s = socket.create_server(('127.0.0.1', {port}))"
    code = f"import socket, time; {listen}; print('up', flush=True); time.sleep(99)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        for words in ([], ["--port", str(port)]):
            command = [sys.executable, "-m", "syncline", "serve", "--config", str(file), *words]
            refused = subprocess.run(command, capture_output=True, text=True, timeout=60)
            assert refused.returncode == 2
            assert f"{port} on 127.0.0.1 is held by pid {holder.pid} (" in refused.stderr
        assert holder.poll() is None, "the stranger is left alone"
        holder.kill()
