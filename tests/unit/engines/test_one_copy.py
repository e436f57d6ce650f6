"""What the owner of one copy tells, and whom those that wait for it name when it does not."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from syncline.bridges.handles import open_views, process_start
from syncline.engines.vllm import compat
from syncline.engines.vllm.one_copy import POLL_SECONDS, owning, tell, told
from syncline.errors import EngineGone, EngineTimeout

PORT, URL = 8001, "http://127.0.0.1:8001"


@pytest.fixture(autouse=True)
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(compat, "vllm_version", lambda: "0.32.0")
    return tmp_path


class Waits:
    """Seconds that were waited; `then` happens at each wait."""

    def __init__(self, then: Callable[[], object] = lambda: None) -> None:
        self.seconds, self._then = 0.0, then

    def __call__(self, seconds: float) -> None:
        self.seconds += seconds
        self._then()


def test_who_attaches_sees_the_owners_bytes_and_what_is_written_later() -> None:
    layer = torch.nn.Linear(3, 2)
    before = layer.weight.detach().clone()
    with owning(PORT):
        waits = Waits(lambda: tell(layer, port=PORT, rank=1))
        exported = told(URL, rank=1, timeout_seconds=10, sleep=waits)
    assert waits.seconds == POLL_SECONDS, "asked again once told, and no longer"
    seen = open_views(exported, device=torch.device("cpu"))
    assert sorted(seen) == ["bias", "weight"]
    assert torch.equal(seen["weight"].tensor, before)
    with torch.no_grad():
        layer.weight.add_(1)
    assert torch.equal(seen["weight"].tensor, before + 1)


def test_nothing_is_left_of_an_owner_that_ended(files: Path) -> None:
    with owning(PORT):
        tell(torch.nn.Linear(3, 2), port=PORT, rank=0)
        [folder] = files.iterdir()
        assert folder.stat().st_mode & 0o77 == 0, "nobody else may write there"
    assert list(files.iterdir()) == []


def owner_that_lives(files: Path) -> subprocess.Popen:
    """As `owning` leaves word in another process."""
    process = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"])
    with owning(PORT):
        [folder] = files.iterdir()
    folder.mkdir()
    (folder / "owner.json").write_text(json.dumps([process.pid, process_start(process.pid)]))
    return process


def killed(process: subprocess.Popen) -> None:
    process.kill()
    process.wait(30)


def test_an_owner_that_dies_is_named_at_once(files: Path) -> None:
    process = owner_that_lives(files)
    waits = Waits(lambda: killed(process))
    with pytest.raises(EngineGone, match=rf"engine at {URL} that owns the weights ended before it had loaded them"):
        told(URL, rank=0, timeout_seconds=300, sleep=waits)
    assert waits.seconds == POLL_SECONDS


def test_an_owner_that_does_not_tell_in_time_is_named_with_the_remedy(files: Path) -> None:
    process, waits = owner_that_lives(files), Waits()
    try:
        with pytest.raises(EngineTimeout) as fault:
            told(URL, rank=0, timeout_seconds=3, sleep=waits)
    finally:
        killed(process)
    wanted = "that owns the weights was not ready in 3 s; raise engine.start_timeout_seconds"
    assert str(fault.value) == f"engine at {URL} {wanted}"
    assert waits.seconds == pytest.approx(3, abs=2 * POLL_SECONDS)


def test_what_a_killed_owner_told_is_not_taken_for_the_next_ones(files: Path) -> None:
    killed(owner_that_lives(files))
    tell(torch.nn.Linear(3, 2), port=PORT, rank=0)
    with pytest.raises(EngineTimeout, match="was not ready in 1 s"):
        told(URL, rank=0, timeout_seconds=1, sleep=Waits())
    with owning(PORT), pytest.raises(EngineTimeout, match="was not ready in 1 s"):
        told(URL, rank=0, timeout_seconds=1, sleep=Waits())
