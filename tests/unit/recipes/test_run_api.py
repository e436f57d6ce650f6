"""`run-api` as its users call it: it answers both kinds of trainers, keeps what they send, and ends when told to."""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from atropos_servers import registration, scored
from real_engine import free_port
from recipe_files import RECIPES, load_recipe

from syncline.trajectory.atropos_wire import Registration
from syncline.trajectory.client import TrajectorySource
from syncline.trajectory.wire import RunTerms


def test_a_port_that_is_none_is_refused_by_value(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    argv = [sys.executable, str(RECIPES / "atropos" / "run-api"), "--port", "70000"]
    assert subprocess.run(argv, cwd=tmp_path, timeout=60, check=False).returncode == 4
    assert "127.0.0.1:70000 cannot be used" in capfd.readouterr().err


@contextmanager
def run_api(folder: Path) -> Iterator[str]:
    port = free_port()
    argv = [sys.executable, str(RECIPES / "atropos" / "run-api"), "--port", str(port)]
    server = subprocess.Popen(argv, cwd=folder)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            try:
                httpx.get(url).raise_for_status()
                break
            except httpx.TransportError:
                assert server.poll() is None
                time.sleep(0.05)
        yield url
        server.send_signal(signal.SIGTERM)
        assert server.wait(30) == 0
    finally:
        server.kill()
        server.wait()


def test_it_serves_trainers_of_the_atropos_api_and_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    grpo = load_recipe("atropos/example_trainer/grpo.py", monkeypatch)
    with run_api(tmp_path) as url:
        assert f"listening on {url}; groups in atropos_api" in capfd.readouterr().err
        assert httpx.post(f"{url}/register", json=registration(batch_size=2)).status_code == 200
        httpx.get(f"{url}/batch")
        assert httpx.post(f"{url}/scored_data", json=scored(3)).json() == {"status": "received"}
        assert httpx.get(f"{url}/batch").json()["batch"][0]["tokens"] == scored(3)["tokens"]
        assert grpo.is_served("127.0.0.1", int(url.rpartition(":")[2])) is True
        terms = RunTerms(
            run_id="ours", groups_per_step=1, rollouts_per_group=2, max_staleness=0, max_refills=0,
            registration=Registration(**registration(batch_size=2)),
        )  # fmt: skip
    with run_api(tmp_path) as url:
        httpx.get(f"{url}/reset_data").raise_for_status()
        with TrajectorySource(url, terms=terms, wait_timeout_seconds=5) as source:
            source.start(policy_version=0, step=0)
            assert httpx.post(f"{url}/scored_data", json=scored(4)).json() == {"status": "received"}
            [group] = source.next_batch(1)
    assert group.rollouts[0].samples[0].token_ids == (1, 4, 7)
    assert sorted(path.parent.name for path in tmp_path.glob("atropos_api/*/trajectories.sqlite")) == ["default"]
