"""The supervisor with real processes: who died is named, nothing is left behind, strangers are not touched."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from syncline.errors import EngineTimeout, ProcessDied
from syncline.launch.child import Child
from syncline.launch.groups import live_members, process_stat
from syncline.launch.plan import Kind, Pool, ProcessSpec, Ready
from syncline.launch.supervisor import Interrupted, Supervisor

DEADLINE_SECONDS = 20.0
SLEEP = "import time; print('up', flush=True); time.sleep(600)"
HTTP = (
    "import http.server, sys\n"
    "class Ok(http.server.BaseHTTPRequestHandler):\n"
    "    def do_GET(self):\n"
    "        self.send_response(200); self.end_headers()\n"
    "    def log_message(self, *args): pass\n"
    "http.server.HTTPServer(('127.0.0.1', int(sys.argv[1])), Ok).serve_forever()\n"
)
WITH_GRANDCHILD = (
    "import subprocess, sys, time\n"
    "child = subprocess.Popen([sys.executable, '-c', 'import signal, time\\n"
    'signal.signal(signal.SIGTERM, signal.SIG_IGN); print("ignoring", flush=True); time.sleep(600)\'])\n'
    "print('grandchild', child.pid, flush=True)\n"
    "time.sleep(600)\n"
)


def spec(folder: Path, name: str, code: str, *argv: str, kind: Kind = Kind.SERVICE, **fields) -> ProcessSpec:
    command = (sys.executable, "-I", "-S", "-u", "-c", code, *argv)
    return ProcessSpec(name=name, argv=command, kind=kind, log=folder / f"{name}.log", **fields)


def job(folder: Path, name: str, code: str, **fields) -> ProcessSpec:
    return spec(folder, name, code, kind=Kind.JOB, **fields)


def ready(port: int, *, timeout_seconds: float = DEADLINE_SECONDS) -> Ready:
    return Ready(
        f"http://127.0.0.1:{port}/health", timeout_seconds, EngineTimeout, "raise engine.start_timeout_seconds"
    )


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "the test waited in vain"
        time.sleep(0.01)


def when(condition: Callable[[], bool], act: Callable[[], object]) -> threading.Thread:
    """Acts from another thread as soon as the condition holds."""
    thread = threading.Thread(target=lambda: (wait_until(condition), act()), daemon=True)
    thread.start()
    return thread


def logged(folder: Path, name: str, text: str) -> bool:
    path = folder / f"{name}.log"
    return path.exists() and text in path.read_text()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Watched:
    """A supervisor whose children's pids are remembered, to look for them afterwards."""

    def __init__(self, specs: list[ProcessSpec], folder: Path, *, grace_seconds: float = 10.0) -> None:
        self.lines: list[str] = []
        self._supervisor = Supervisor(specs, folder=folder, show=self.lines.append, grace_seconds=grace_seconds)

    def run(self) -> None:
        with self._supervisor as supervisor:
            supervisor.run()

    def pid(self, name: str) -> int:
        started = [line for line in self.lines if f"started {name} (pid " in line]
        return int(started[0].rpartition("pid ")[2].rstrip(")")) if started else 0

    def assert_nothing_left(self, names: list[str]) -> None:
        for name in names:
            assert self.pid(name), f"{name} was never started"
            assert live_members(self.pid(name)) == []
            assert process_stat(self.pid(name)) is None, f"{name} was not reaped"


def test_jobs_run_in_order_and_services_stop(tmp_path: Path) -> None:
    port = free_port()
    watched = Watched(
        [
            spec(tmp_path, "engine", HTTP, str(port), ready=ready(port)),
            spec(tmp_path, "env", SLEEP, ends_with="learner"),
            job(tmp_path, "before", "print('measured')", starts_after=("engine",)),
            job(tmp_path, "learner", "print('trained')", starts_after=("before",)),
            job(tmp_path, "last", "print('measured again')", starts_after=("learner",)),
        ],
        tmp_path,
    )
    watched.run()
    told = [line.partition("| ")[2] for line in watched.lines if line.startswith("supervisor")]
    order = [line.split(" after ")[0].split(" (pid")[0] for line in told]
    assert order.index("engine is ready") < order.index("started before") < order.index("before is done")
    assert order.index("before is done") < order.index("started learner") < order.index("started last")
    assert (tmp_path / "env.log").exists()
    assert any(line.startswith("before") and line.endswith("| measured") for line in watched.lines)
    watched.assert_nothing_left(["engine", "env", "before", "learner", "last"])


def test_a_job_whose_file_exists_is_skipped(tmp_path: Path) -> None:
    (tmp_path / "before.json").write_text("{}")
    watched = Watched(
        [
            job(tmp_path, "before", "raise SystemExit(9)", creates=tmp_path / "before.json"),
            job(tmp_path, "learner", "pass", starts_after=("before",)),
        ],
        tmp_path,
    )
    watched.run()
    assert watched.pid("before") == 0
    assert watched.pid("learner") != 0


@pytest.mark.parametrize("victim", ["trajectories", "engine", "env", "learner"])
def test_a_killed_process_is_named_and_everything_stops(tmp_path: Path, victim: str) -> None:
    names = ["trajectories", "engine", "env", "learner"]
    specs = [spec(tmp_path, name, SLEEP) for name in names[:3]] + [job(tmp_path, "learner", SLEEP)]
    watched = Watched(specs, tmp_path)
    when(
        lambda: all(logged(tmp_path, name, "up") for name in names),
        lambda: os.kill(watched.pid(victim), signal.SIGKILL),
    )
    with pytest.raises(ProcessDied, match=rf"^{victim} \(pid \d+\) was killed by SIGKILL") as died:
        watched.run()
    assert died.value.exit_code == 8
    assert "| up" in str(died.value), "the message ends with the log's last lines"
    watched.assert_nothing_left(names)


@pytest.mark.parametrize(("code", "exit_code"), [(3, 3), (7, 7), (42, 8)])
def test_a_process_that_fails_gives_its_own_exit_code(tmp_path: Path, code: int, exit_code: int) -> None:
    failing = f"import sys; print('cannot go on'); sys.exit({code})"
    watched = Watched([spec(tmp_path, "engine", SLEEP), job(tmp_path, "learner", failing)], tmp_path)
    with pytest.raises(ProcessDied, match=rf"learner .* exited with code {code}.*\n.*cannot go on") as died:
        watched.run()
    assert died.value.exit_code == exit_code
    watched.assert_nothing_left(["engine", "learner"])


def test_a_service_that_ends_with_0_has_died_too(tmp_path: Path) -> None:
    watched = Watched([spec(tmp_path, "env", "pass"), job(tmp_path, "learner", SLEEP)], tmp_path)
    with pytest.raises(ProcessDied, match=r"env .* exited with code 0") as died:
        watched.run()
    assert died.value.exit_code == 8


def test_grandchildren_that_ignore_sigterm_are_gone_too(tmp_path: Path) -> None:
    watched = Watched(
        [spec(tmp_path, "engine", WITH_GRANDCHILD), job(tmp_path, "learner", SLEEP)], tmp_path, grace_seconds=0.2
    )
    when(
        lambda: logged(tmp_path, "engine", "ignoring") and logged(tmp_path, "engine", "grandchild"),
        lambda: os.kill(watched.pid("engine"), signal.SIGKILL),
    )
    with pytest.raises(ProcessDied, match="engine"):
        watched.run()
    log = (tmp_path / "engine.log").read_text()
    grandchild = int(log.partition("grandchild ")[2].split()[0])
    assert process_stat(grandchild) is None, "dead and reaped"
    watched.assert_nothing_left(["engine", "learner"])


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_stops_everything(tmp_path: Path, number: int, exit_code: int) -> None:
    before = signal.getsignal(number)
    watched = Watched([spec(tmp_path, "engine", SLEEP), job(tmp_path, "learner", SLEEP)], tmp_path)
    when(lambda: logged(tmp_path, "learner", "up"), lambda: os.kill(os.getpid(), number))
    with pytest.raises(Interrupted) as interrupted:
        watched.run()
    assert interrupted.value.exit_code == exit_code
    watched.assert_nothing_left(["engine", "learner"])
    assert signal.getsignal(number) is before


def test_a_second_ctrl_c_cuts_the_grace_short(tmp_path: Path) -> None:
    stubborn = (
        "import signal, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: print('no', flush=True)); print('up', flush=True)\n"
        "while True: time.sleep(1)\n"
    )
    watched = Watched([job(tmp_path, "learner", stubborn)], tmp_path, grace_seconds=600.0)
    when(lambda: logged(tmp_path, "learner", "up"), lambda: os.kill(os.getpid(), signal.SIGINT))
    when(lambda: logged(tmp_path, "learner", "no"), lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(Interrupted):
        watched.run()
    watched.assert_nothing_left(["learner"])


def test_a_service_that_never_answers_is_named(tmp_path: Path) -> None:
    port = free_port()
    late = ready(port, timeout_seconds=0.5)
    watched = Watched([spec(tmp_path, "engine", SLEEP, ready=late), job(tmp_path, "learner", SLEEP)], tmp_path)
    with pytest.raises(
        EngineTimeout, match=rf"engine .* did not answer .*:{port}/health within 0.5 s; raise engine.start"
    ):
        watched.run()
    watched.assert_nothing_left(["engine", "learner"])


@pytest.mark.parametrize(("excepted", "seen"), [(None, ""), ("a.example", "a.example,")])
def test_processes_speak_to_each_other_past_a_proxy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, excepted: str | None, seen: str
) -> None:
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    if excepted:
        monkeypatch.setenv("NO_PROXY", excepted)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    told = "import os; print(os.environ['no_proxy'], os.environ['NO_PROXY'], os.environ['http_proxy'])"
    with Supervisor([job(tmp_path, "j", told)], folder=tmp_path, show=lambda line: None) as supervisor:
        supervisor.run()
    around = f"{seen}127.0.0.1,localhost,::1"
    assert (tmp_path / "j.log").read_text().split() == [around, around, "http://127.0.0.1:9"]


def test_a_stranger_lives_on(tmp_path: Path) -> None:
    port = free_port()
    with subprocess.Popen([sys.executable, "-I", "-S", "-c", HTTP, str(port)]) as stranger:
        watched = Watched([spec(tmp_path, "engine", HTTP, str(port)), job(tmp_path, "learner", SLEEP)], tmp_path)
        wait_until(lambda: socket.socket().connect_ex(("127.0.0.1", port)) == 0)
        with pytest.raises(ProcessDied, match=r"(?s)engine .* exited with code 1.*Address already in use"):
            watched.run()
        assert stranger.poll() is None
        stranger.kill()


def test_a_process_that_cannot_be_stopped_keeps_no_other_alive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(child: Child, **options) -> list[int]:
        stopped = real(child, **options)
        if child.spec.name == "env":
            raise OSError("the kernel told us nothing of env")
        return stopped

    real = Child.stop
    monkeypatch.setattr(Child, "stop", stop)
    names = ["engine", "env"]
    watched = Watched([*(spec(tmp_path, name, SLEEP) for name in names), job(tmp_path, "learner", SLEEP)], tmp_path)
    when(lambda: logged(tmp_path, "learner", "up"), lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(OSError, match="nothing of env"):
        watched.run()
    watched.assert_nothing_left(["engine", "env", "learner"])


SUPERVISED = """
import sys
sys.path[:0] = {path!r}
from pathlib import Path
from syncline.launch.plan import Kind, ProcessSpec
from syncline.launch.supervisor import Supervisor
folder = Path({folder!r})
specs = [
    ProcessSpec(
        name="engine", argv=(sys.executable, "-c", {grandchild!r}), kind=Kind.SERVICE, log=folder / "engine.log"
    ),
    ProcessSpec(name="learner", argv=(sys.executable, "-c", {sleep!r}), kind=Kind.JOB, log=folder / "learner.log"),
]
with Supervisor(specs, folder=folder) as supervisor:
    supervisor.run()
"""


def test_children_and_grandchildren_die_with_a_killed_supervisor(tmp_path: Path) -> None:
    code = SUPERVISED.format(path=sys.path, folder=str(tmp_path), grandchild=WITH_GRANDCHILD, sleep=SLEEP)
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": ":".join(sys.path)},
    ) as supervisor:
        wait_until(lambda: logged(tmp_path, "engine", "ignoring") and logged(tmp_path, "learner", "up"))
        log = (tmp_path / "engine.log").read_text()
        assert supervisor.stdout is not None
        started = [line for line in (supervisor.stdout.readline(), supervisor.stdout.readline()) if "pid" in line]
        pids = [int(line.rpartition("pid ")[2].strip(")\n")) for line in started]
        pids.append(int(log.partition("grandchild ")[2].split()[0]))
        assert len(pids) == 3
        supervisor.kill()
        wait_until(lambda: all((stat := process_stat(pid)) is None or stat.zombie for pid in pids))


def pooled(folder: Path, *, min_alive: int, max_restarts: int = 1) -> list[ProcessSpec]:
    pool = Pool(("engine", "engine-1"), min_alive, max_restarts)
    engines = [
        spec(folder, name, HTTP, str(port := free_port()), ready=ready(port), ports=(port,), pool=pool)
        for name in pool.names
    ]
    return [*engines, job(folder, "learner", SLEEP, starts_after=pool.names)]


def is_told(watched: Watched, text: str, *, times: int = 1) -> bool:
    return sum(text in line for line in watched.lines) >= times


def kill(watched: Watched, name: str) -> None:
    started = [line for line in watched.lines if f"started {name} (pid " in line]
    os.kill(int(started[-1].rpartition("pid ")[2].rstrip(")")), signal.SIGKILL)


def test_a_service_of_a_pool_is_started_again_as_often_as_allowed_and_then_missed(tmp_path: Path) -> None:
    watched = Watched(pooled(tmp_path, min_alive=1), tmp_path)
    when(lambda: watched.pid("learner") != 0, lambda: kill(watched, "engine-1"))
    when(lambda: is_told(watched, "engine-1 is ready", times=2), lambda: kill(watched, "engine-1"))
    gone = "engine-1 (pid"
    when(
        lambda: any(gone in line and "going on without" in line for line in watched.lines),
        lambda: os.kill(watched.pid("learner"), signal.SIGKILL),
    )
    with pytest.raises(ProcessDied, match="learner"):
        watched.run()
    told = [line.rpartition("; ")[2] for line in watched.lines if gone in line and "SIGKILL" in line]
    assert told == ["starting it again, 1 of 1", "going on without"]
    watched.assert_nothing_left(["engine", "engine-1", "learner"])


def test_a_service_started_again_is_stopped_after_those_that_need_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(child: Child, **options) -> list[int]:
        stopped.append(child.spec.name)
        return real(child, **options)

    real, stopped = Child.stop, []
    monkeypatch.setattr(Child, "stop", stop)
    watched = Watched(pooled(tmp_path, min_alive=1), tmp_path)
    when(lambda: watched.pid("learner") != 0, lambda: kill(watched, "engine-1"))
    when(lambda: is_told(watched, "engine-1 is ready", times=2), lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(Interrupted):
        watched.run()
    assert stopped == ["engine-1", "learner", "engine-1", "engine"]


def test_a_pool_below_its_least_ends_the_run(tmp_path: Path) -> None:
    watched = Watched(pooled(tmp_path, min_alive=2), tmp_path)
    when(lambda: watched.pid("learner") != 0, lambda: kill(watched, "engine"))
    with pytest.raises(ProcessDied, match=r"engine \(pid \d+\) was killed by SIGKILL"):
        watched.run()


def test_services_alone_run_until_somebody_stops_them(tmp_path: Path) -> None:
    watched = Watched([spec(tmp_path, "engine", SLEEP)], tmp_path)
    when(lambda: logged(tmp_path, "engine", "up"), lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Interrupted):
        watched.run()
    watched.assert_nothing_left(["engine"])
