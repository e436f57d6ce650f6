"""Groups are found and stopped whatever else runs on the host, and however it is called."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from syncline.launch import groups, guardian
from syncline.launch.groups import live_members, process_stat, stop_group

SLEEP = [sys.executable, "-I", "-S", "-c", "import time; time.sleep(600)"]


def test_a_name_that_is_cut_inside_a_character_is_no_hindrance(cut_name: None) -> None:
    with pytest.raises(UnicodeDecodeError):
        Path("/proc/self/stat").read_bytes().decode()
    stat = process_stat(os.getpid())
    assert stat is not None
    assert (stat.pid, stat.group, stat.zombie) == (os.getpid(), os.getpgid(0), False)
    with subprocess.Popen(SLEEP, start_new_session=True) as ours:
        started = process_stat(ours.pid)
        assert started is not None
        assert live_members(ours.pid) == [ours.pid]
        assert stop_group(ours.pid, started.start_time, grace_seconds=10.0) == []


def test_a_process_hidden_from_us_is_none_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    def hidden(path: Path) -> bytes:
        raise PermissionError(13, "Operation not permitted", str(path))

    monkeypatch.setattr(Path, "read_bytes", hidden)
    assert process_stat(1) is None
    assert groups.live_members(1) == []


def test_the_guardian_stops_every_group_even_if_one_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []

    def stop(pid: int, start_time: int, *, grace_seconds: float) -> None:
        tried.append(pid)
        if pid == 3:
            raise OSError(f"cannot stop {pid}")

    processes = tmp_path / "processes.json"
    processes.write_text(json.dumps({"processes": [{"pid": pid, "start_time": 7} for pid in (2, 3, 4)]}))
    monkeypatch.setattr(guardian, "stop_group", stop)
    monkeypatch.setattr(sys, "argv", ["guardian", str(processes)])
    with processes.open() as nobody, pytest.raises(OSError, match="cannot stop 3"):
        nobody.seek(0, os.SEEK_END)
        monkeypatch.setattr(sys, "stdin", nobody)
        guardian.main()
    assert tried == [4, 3, 2]
