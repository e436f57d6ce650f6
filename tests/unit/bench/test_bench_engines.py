"""Engines that start at once: what became of each is told when all have answered, died or run out of time."""

import os
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from syncline.bench.engine import Server, Started, started, together
from syncline.errors import EngineGone
from syncline.launch.groups import live_members

ANSWERING = """
import http.server, subprocess, sys
subprocess.Popen(["sleep", "600"])  # as an engine has processes of its own

class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

http.server.HTTPServer(("127.0.0.1", int(sys.argv[2])), Health).serve_forever()
"""
DYING = "import sys; sys.exit('no such model')"
LATE = "import time; time.sleep(600)"


def server(folder: Path, name: str, program: str) -> Server:
    return Server([sys.executable, "-c", program], folder / f"{name}.log", gpus=[])


def test_one_that_dies_or_is_late_costs_itself_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    programs = {"dying": DYING, "late": LATE, "good": ANSWERING}
    servers: dict[str, Server] = {}

    def start(name: str, program: str) -> Server:
        servers[name] = server(tmp_path, name, program)
        return servers[name]

    starts = {name: partial(start, name, program) for name, program in programs.items()}
    with together(starts, tmp_path / "found.json", seconds=5.0):
        found = started(tmp_path / "found.json")
        assert list(found) == list(programs)
        assert "ended with 1 before it was ready" in found["dying"].fault
        assert "was not ready" in found["late"].fault
        assert live_members(servers["late"].pid) == [], "it would disturb what is measured"
        assert found["good"] == Started(servers["good"].url)
        assert live_members(servers["good"].pid)
    assert "no such model" in capsys.readouterr().err
    assert live_members(servers["good"].pid) == []


def test_engines_that_still_start_end_with_the_block_quietly(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = tmp_path / "found.json"
    found.write_text("{}")
    begun = time.monotonic()
    with together({"late": partial(server, tmp_path, "late", LATE)}, found, seconds=600.0):
        assert not found.exists(), "that of the engines before"
    assert time.monotonic() - begun < 60
    assert capsys.readouterr().err == ""


def test_who_needs_an_engine_that_is_not_there_hears_why() -> None:
    assert Started("http://here").answering() == "http://here"
    with pytest.raises(EngineGone, match="out of memory"):
        Started("http://here", "out of memory").answering()


def test_device_memory_is_counted_by_process_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver's list, of which two are of this group, one has no figure and one has gone."""
    mine, parent = os.getpid(), os.getppid()
    program = tmp_path / "nvidia-smi"
    lines = [f"{mine}, 1024", f"{mine}, 1", f"{parent}, [N/A]", "4194304, 7"]
    program.write_text("#!/bin/sh\n" + "".join(f"echo '{line}'\n" for line in lines))
    program.chmod(0o755)
    monkeypatch.setattr("syncline.bench.engine.GPU_PROCESSES", (str(program),))
    from syncline.bench.engine import gpu_bytes

    assert gpu_bytes() == {os.getpgid(0): 1025 << 20}
