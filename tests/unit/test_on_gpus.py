"""The runner of GPU tests: who gets which GPU, what a deadline ends, and a table in any case. No GPU is needed."""

import os
import subprocess
import time
from pathlib import Path

import pytest
from gpu_jobs import Job
from on_gpus import Places, Session, kill, marked
from outcomes import chaos_rows, contract_rows

ONE, TWO, ALONE = Job("one", 1, ()), Job("two", 2, ()), Job("alone", 1, (), alone=True)
TESTS = {
    "passes": "def test_it():\n    assert True\n",
    "fails": (
        "def test_first(tmp_path):\n"
        "    (tmp_path / 'engine.log').write_text('the engine said why')\n"
        "    assert 1 + 1 == 3, 'one and one'\n\n"
        "def test_second():\n    pass\n"
    ),
    "hangs": (
        "import os, subprocess, time\n\n"
        "def test_done():\n    pass\n\n"
        "def test_stuck(tmp_path):\n"
        "    subprocess.Popen(['sleep', '600'], start_new_session=True)\n"
        "    open(os.environ['STUCK'], 'w').close()\n"
        "    time.sleep(600)\n"
    ),
}


@pytest.fixture
def session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Session:
    monkeypatch.setenv("STUCK", str(tmp_path / "stuck"))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    for name, text in TESTS.items():
        (tmp_path / f"test_{name}.py").write_text(text)
    jobs = [Job(name, 1, (str(tmp_path / f"test_{name}.py"), "-p", "outcomes")) for name in TESTS]
    return Session(Places(["0", "1"], share=2), tmp_path, tmp_path, 30.0, [*jobs, Job("wide", 2, ("--version",))])


def test_every_job_is_in_the_table_and_nothing_it_started_is_left(session: Session) -> None:
    started = time.monotonic()
    stuck = session.out / "stuck"
    while session.waiting or len(session.running) > 1 or not stuck.exists():
        session.run(time.monotonic() + 0.5)
        assert time.monotonic() - started < 60, session.report()
    [hanging] = session.running
    assert len(marked({hanging.mark})) == 2, "pytest and what it started in a process session of its own"
    session.stop_all("stopped")
    assert marked({hanging.mark}) == []
    rows = {
        row.split("|")[1].strip(): [word.strip() for word in row.split("|")] for row in session.report().splitlines()
    }
    assert rows["passes"][4:8] == ["ok", "1", "0", "0"]
    assert rows["fails"][4:8] == ["exit 1", "1", "1", "0"]
    assert rows["fails"][8].startswith("test_first: AssertionError: one and one")
    assert "engine.log\nthe engine said why" in (session.out / "fails.processes.log").read_text()
    assert not (session.out / "passes.processes.log").exists()
    assert rows["hangs"][4:6] == ["stopped", "1"]
    assert rows["wide"][2].startswith("2 (")
    assert not session.passed()


def test_a_job_is_ended_at_its_deadline_and_others_that_wait_are_named(session: Session) -> None:
    session.job_seconds = 0.0
    session.waiting = [job for job in session.waiting if job.name in ("hangs", "wide")]
    for _ in range(3):
        session.places.take(ONE)
    session.run(time.monotonic() + 1.0)
    assert [attempt.verdict for attempt in session.ended] == ["stopped: its 0 s were over"]
    assert "not started" in session.report()


def test_gpus_are_shared_evenly_and_a_job_gets_different_ones() -> None:
    places = Places(["0", "1"], share=2)
    assert places.take(TWO) == ["0", "1"]
    assert sorted([*(places.take(ONE) or []), *(places.take(ONE) or [])]) == ["0", "1"]
    assert places.take(ONE) is None
    places.give_back(ONE, ["1"])
    assert places.take(TWO) is None
    assert places.take(ONE) == ["1"]


def test_a_job_that_is_alone_has_a_gpu_that_no_other_uses() -> None:
    places = Places(["0", "1"], share=3)
    assert places.take(ONE) == ["0"]
    assert places.take(ALONE) == ["1"]
    assert places.take(ALONE) is None
    assert places.take(ONE) == ["0"]
    places.give_back(ALONE, ["1"])
    assert places.take(ONE) == ["1"]


def test_only_processes_with_the_mark_are_ended() -> None:
    ours, other = (
        subprocess.Popen(["sleep", "600"], env=os.environ | {"SYNCLINE_TEST_JOB": mark}) for mark in ("a-1", "a-12")
    )
    kill({"a-1"})
    assert ours.wait(10) == -9
    assert other.poll() is None
    other.kill()
    other.wait(10)


def test_contracts_are_counted_by_bridge_device_and_ranks() -> None:
    row = {"bridge": "shared", "device": "CPU", "tensor_parallel": 2}
    lines = [{"outcome": "passed", "contract": row}, {"outcome": "failed", "contract": row}, {"outcome": "passed"}]
    assert contract_rows(lines)[1:] == [["shared", "CPU", "2", "1", "1", "0"]]


def test_faults_are_told_once_for_the_bridges_that_noticed_them_alike() -> None:
    def line(fault: str, bridge: str, by: str) -> dict:
        return {"outcome": "passed", "chaos": [{"fault": fault, "bridge": bridge, "by": by, "told": f"{bridge} a|b"}]}

    lines = [line("stale", "shared", "digests"), line("killed", "lora", "learner"), line("stale", "lora", "digests")]
    unproved = line("stale", "restart", "digests") | {"outcome": "failed"}
    assert chaos_rows([*lines, unproved])[1:] == [
        ["stale", "lora, shared", "digests", "lora a/b"],
        ["killed", "lora", "learner", "lora a/b"],
    ]
