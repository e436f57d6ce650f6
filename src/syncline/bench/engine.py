"""An engine to measure: `syncline serve` as a user starts it, ended by pid."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from syncline.engines.client import EngineController
from syncline.errors import EngineError, EngineTimeout

START_SECONDS = 600.0
STOP_SECONDS = 60.0
LOG_CHARACTERS = 3000


@contextmanager
def serving(
    values: Mapping[str, Any],
    folder: Path,
    *,
    name: str,
    gpus: Sequence[int],
    options: Sequence[str] = (),
    start_seconds: float = START_SECONDS,
) -> Iterator[EngineController]:
    """The engine, ready. Its log is printed when the block fails."""
    file, log = folder / f"{name}.yaml", folder / f"{name}.log"
    file.write_text(yaml.safe_dump(dict(values)))
    port = free_port()
    argv = [sys.executable, "-m", "syncline", "serve", str(file), "--port", str(port), *options]
    with log.open("w") as output:
        process = subprocess.Popen(argv, stdout=output, stderr=output, env=seeing(gpus), start_new_session=True)
    engine = EngineController(f"http://127.0.0.1:{port}", start_timeout_seconds=START_SECONDS)
    try:
        _wait_until_ready(engine, process, start_seconds)
        yield engine
    except BaseException:
        print(f"{log} ends with:\n{log.read_text()[-LOG_CHARACTERS:]}", file=sys.stderr)
        raise
    finally:
        engine.close()
        stop(process)


def _wait_until_ready(engine: EngineController, process: subprocess.Popen[bytes], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while process.poll() is None:
        try:
            return engine.wait_until_ready(timeout_seconds=1.0)
        except EngineTimeout:
            if time.monotonic() > deadline:
                raise
    raise EngineError(f"the engine ended with {process.returncode} before it was ready")


def stop(process: subprocess.Popen[Any]) -> None:
    """SIGTERM to the group this process leads, SIGKILL to what outlives it."""
    try:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(STOP_SECONDS)
    except ProcessLookupError:
        process.wait(STOP_SECONDS)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def seeing(gpus: Sequence[int]) -> dict[str, str]:
    """This environment, with the given ones of the GPUs it shows; none: the CPU."""
    names = os.environ.get("CUDA_VISIBLE_DEVICES")
    shown = names.split(",") if names else None
    return os.environ | {"CUDA_VISIBLE_DEVICES": ",".join(shown[i] if shown else str(i) for i in gpus)}
