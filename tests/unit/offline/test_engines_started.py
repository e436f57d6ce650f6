"""Engines that a stage starts: all at once, and gone with its body. Here they are small servers."""

import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from syncline.config import RunConfig, resolve
from syncline.errors import EngineTimeout
from syncline.launch.plan import Kind, ProcessSpec, Ready
from syncline.observe.files import read_object
from syncline.offline import engines
from syncline.offline.engines import running_engines

SERVER = """
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def spec(index: int, port: int, folder: Path) -> ProcessSpec:
    ready = Ready(f"http://127.0.0.1:{port}/health", 20.0, EngineTimeout, "")
    argv = (sys.executable, "-c", SERVER, str(port))
    return ProcessSpec(f"engine-{index}", argv, Kind.SERVICE, folder / f"engine-{index}.log", ready=ready)


def run_of_two(folder: Path) -> RunConfig:
    return resolve({
        "run": {"dir": str(folder), "num_steps": 1, "groups_per_step": 1},
        "model": {"path": "m", "max_length": 64},
        "sampling": {"max_tokens": 8},
        "environments": [{"task": "arithmetic"}],
        "engine": {"num_replicas": 2, "device": "cpu"},
        "learner": {"device": "cpu"},
    })  # fmt: skip


def test_engines_are_ready_in_the_body_and_gone_after_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def planned(run: RunConfig, *, ports: dict[str, int], folder: Path, **of_the_machine: Any) -> list[ProcessSpec]:
        assert len(ports) == run.engine.num_replicas == 2, "and none for a server that is not started"
        return [spec(i, port, folder) for i, port in enumerate(ports.values())]

    monkeypatch.setattr(engines, "plan_servers", planned)
    told: list[str] = []
    with running_engines(run_of_two(tmp_path), show=told.append) as urls:
        assert len(set(urls)) == 2
        record: Any = read_object(tmp_path / "processes.json")
        pids = [one["pid"] for one in record["processes"]]
        assert all(psutil.pid_exists(pid) for pid in pids)
    assert not any(psutil.pid_exists(pid) for pid in pids)
    assert told[-1].startswith("2 engines are ready after")
