"""Servers to measure: `syncline serve` as a user starts it, TRL's server, any number of them at once, ended by pid.

`together` starts all; a thread of it waits until each answers, is dead or late, and then writes what became of them to
a file. Who waits for that file: whoever measures, in another process, so that no start disturbs a measurement. Who
unblocks: the last server's answer or end, or the time they have.
"""

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Event, Thread
from typing import Any

import yaml

from syncline.engines.client import EngineController
from syncline.errors import EngineError, EngineGone, EngineTimeout
from syncline.launch.groups import process_stat, stop_group

START_SECONDS = 600.0
STOP_SECONDS = 20.0
POLL_SECONDS = 0.2
LOG_CHARACTERS = 3000
GPU_PROCESSES = ("nvidia-smi", "--query-compute-apps=pid,used_gpu_memory", "--format=csv,noheader,nounits")


class Server:
    """A process of its own group that answers `/health`, started now. `log` is where it writes."""

    def __init__(self, argv: Sequence[str], log: Path, *, gpus: Sequence[int], **environment: str) -> None:
        port, self._log = free_port(), log
        self.url = f"http://127.0.0.1:{port}"
        argv, env = [*argv, "--port", str(port)], seeing(gpus) | environment
        with log.open("w") as output:
            self._process = subprocess.Popen(argv, stdout=output, stderr=output, env=env, start_new_session=True)
        stat = process_stat(self.pid)
        assert stat is not None, "an unreaped child has a stat"
        self._start_time = stat.start_time

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait_until_ready(self, deadline: float) -> None:
        """Raises `EngineError` once it is dead or, by `time.monotonic`, late."""
        with closing(EngineController(self.url, timeout_seconds=START_SECONDS)) as engine:
            while self._process.poll() is None:
                with suppress(EngineTimeout):
                    return engine.wait_until_ready(timeout_seconds=1.0)
                if time.monotonic() > deadline:
                    raise EngineTimeout(f"{self._log.stem} was not ready in the time that it had to start")
        raise EngineError(f"{self._log.stem} ended with {self._process.returncode} before it was ready")

    def stop(self) -> None:
        """SIGTERM to its group, SIGKILL to what outlives it."""
        stop_group(self.pid, self._start_time, grace_seconds=STOP_SECONDS)
        self._process.wait(STOP_SECONDS)

    def print_log(self) -> None:
        print(f"{self._log} ends with:\n{self._log.read_text()[-LOG_CHARACTERS:]}", file=sys.stderr)


def serve(values: Mapping[str, Any], log: Path, *options: str, gpus: Sequence[int], **environment: str) -> Server:
    """`syncline serve`, starting; its file lies beside its log."""
    file = log.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(dict(values)))
    argv = [sys.executable, "-m", "syncline", "serve", str(file), *options]
    return Server(argv, log, gpus=gpus, **environment)


@dataclass(frozen=True, slots=True)
class Started:
    """What became of a server."""

    url: str
    fault: str = ""
    """Why it is not there."""
    gpu_bytes: int | None = None
    """Device memory its processes held once all were ready; `None`: on a CPU, or the driver does not tell."""

    def answering(self) -> str:
        """The URL. Raises `EngineGone` for one that is not there."""
        if self.fault:
            raise EngineGone(self.fault)
        return self.url


@contextmanager
def together(starts: Mapping[str, Callable[[], Server]], found: Path, *, seconds: float) -> Iterator[None]:
    """All of them start and live as long as the block; what became of each is in `found` after `seconds` at the
    latest, for `started`."""
    found.unlink(missing_ok=True)
    servers: dict[str, Server] = {}
    over = Event()
    try:
        for name, start in starts.items():
            servers[name] = start()
        Thread(target=_tell, args=(servers, found, time.monotonic() + seconds, over), daemon=True).start()
        yield
    finally:
        over.set()
        with ThreadPoolExecutor(max(1, len(servers))) as threads:
            list(threads.map(Server.stop, servers.values()))


def started(found: Path) -> dict[str, Started]:
    """Waits until `together` has written `found`."""
    deadline = time.monotonic() + 2 * START_SECONDS
    while not found.exists():
        if time.monotonic() > deadline:
            raise EngineTimeout(f"nobody wrote {found}, which tells what became of the engines")
        time.sleep(POLL_SECONDS)
    return {name: Started(**values) for name, values in json.loads(found.read_text()).items()}


def _tell(servers: Mapping[str, Server], found: Path, deadline: float, over: Event) -> None:
    faults: dict[str, str] = {}
    begun = time.monotonic()
    for name, server in servers.items():
        try:
            server.wait_until_ready(deadline)
        except EngineError as fault:
            if over.is_set():
                return
            faults[name] = str(fault)
            server.print_log()
            server.stop()  # it would disturb what is measured
    print(f"engines: {len(servers) - len(faults)} there after {time.monotonic() - begun:.0f} s", flush=True)
    held = gpu_bytes()
    told = {name: Started(one.url, faults.get(name, ""), held.get(one.pid)) for name, one in servers.items()}
    partial = found.with_suffix(".partial")
    partial.write_text(json.dumps({name: asdict(one) for name, one in told.items()}))
    partial.rename(found)


def gpu_bytes() -> dict[int, int]:
    """Device memory by process group, as the driver counts it; empty where there is none, or it does not say."""
    try:
        told = subprocess.run(GPU_PROCESSES, capture_output=True, text=True, timeout=30.0).stdout
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return {}
    held: dict[int, int] = {}
    for pid, mebibytes in re.findall(r"^(\d+), (\d+)$", told, re.MULTILINE):
        if stat := process_stat(int(pid)):
            held[stat.group] = held.get(stat.group, 0) + (int(mebibytes) << 20)
    return held


def own_cache(log: Path) -> str:
    """For an engine that starts while others do: vLLM writes a cache's index in place, where they would read it."""
    return str(log.with_suffix(".cache"))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def seeing(gpus: Sequence[int]) -> dict[str, str]:
    """This environment, with the given ones of the GPUs it shows; none: the CPU."""
    names = os.environ.get("CUDA_VISIBLE_DEVICES")
    shown = names.split(",") if names else None
    return os.environ | {"CUDA_VISIBLE_DEVICES": ",".join(shown[i] if shown else str(i) for i in gpus)}
