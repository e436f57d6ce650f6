"""Engines of one copy are started together, and who ends first is named, not the one that waits for it."""

import dataclasses
import sys
from pathlib import Path

import pytest

from syncline.config import resolve
from syncline.errors import EngineTimeout, ProcessDied
from syncline.launch.plan import Machine, ProcessSpec, plan_servers, wanted_engine_ports
from syncline.launch.supervisor import Supervisor

NEVER_READY = "import time; time.sleep(600)"
BROKEN = "raise SystemExit('no such model')"


def engines(folder: Path, *codes: str, start_timeout_seconds: float = 20) -> list[ProcessSpec]:
    """As planned, but for what they run."""
    values = {
        "run": {"dir": str(folder), "num_steps": 1, "groups_per_step": 1},
        "model": {"path": "m", "max_length": 64},
        "sampling": {"max_tokens": 8},
        "environments": [{"task": "arithmetic"}],
        "engine": {"device": "cpu", "num_replicas": 2, "start_timeout_seconds": start_timeout_seconds},
        "learner": {"device": "cpu"},
        "bridge": {"name": "shared"},
    }
    config = resolve(values)
    ports = {field: 8001 + i for i, field in enumerate(wanted_engine_ports(config))}
    machine = Machine(num_cores=2, gpus=(), python=sys.executable)
    planned = plan_servers(config, ports=ports, machine=machine, folder=folder)
    return [
        dataclasses.replace(spec, argv=(sys.executable, "-I", "-S", "-c", code))
        for spec, code in zip(planned, codes, strict=True)
    ]


def told(specs: list[ProcessSpec], folder: Path, fault: type[Exception]) -> tuple[list[str], str]:
    lines: list[str] = []
    with pytest.raises(fault) as raised, Supervisor(specs, folder=folder, show=lines.append) as supervisor:
        supervisor.run()
    return [line.partition("| ")[2] for line in lines if line.startswith("supervisor")], str(raised.value)


def test_both_are_started_before_either_is_ready_and_the_owner_is_the_one_that_was_late(tmp_path: Path) -> None:
    specs = engines(tmp_path, NEVER_READY, NEVER_READY, start_timeout_seconds=0.5)
    lines, fault = told(specs, tmp_path, EngineTimeout)
    assert [line.partition(" (pid")[0] for line in lines] == ["started engine", "started engine-1"]
    assert fault.startswith("engine (pid ")
    assert "within 0.5 s; raise engine.start_timeout_seconds" in fault


def test_an_owner_that_ends_is_named_while_the_other_waits(tmp_path: Path) -> None:
    lines, fault = told(engines(tmp_path, BROKEN, NEVER_READY), tmp_path, ProcessDied)
    assert "started engine-1" in " ".join(lines)
    assert fault.startswith("engine (pid ")
    assert "no such model" in fault
