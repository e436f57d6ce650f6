"""The real trajectory server as a child process, for tests: started, killed and started again on one store."""

import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx

_SCRIPT = """
import sys
from syncline.config.schema import Run, Trajectory
from syncline.trajectory.atropos_wire import Registration
from syncline.trajectory.serve import run_server
run_dir, (port, groups_per_step, max_staleness, max_store_bytes) = sys.argv[1], map(int, sys.argv[2:])
run = Run(
    dir=run_dir, num_steps=10, groups_per_step=groups_per_step, rollouts_per_group=2, max_staleness=max_staleness
)
own = Registration(
    wandb_group="run", wandb_project="syncline", batch_size=2 * groups_per_step, max_token_len=128,
    checkpoint_dir=run_dir, save_checkpoint_interval=5, starting_step=0, num_steps=10,
)
trajectory = Trajectory(max_store_bytes=max_store_bytes)
run_server(run, trajectory, environments={"math": 1.0, "code": 1.0}, run_id="test", port=port, own=own)
"""


class TrajectoryProcess:
    """With `max_staleness` 3 the capacity is four times `groups_per_step`."""

    def __init__(
        self, run_dir: Path, *, groups_per_step: int = 1, max_staleness: int = 3, max_store_bytes: int = 1 << 30
    ) -> None:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        numbers = [str(number) for number in (self.port, groups_per_step, max_staleness, max_store_bytes)]
        self._argv = [sys.executable, "-c", _SCRIPT, str(run_dir), *numbers]
        self.process = subprocess.Popen(self._argv)

    def restart(self) -> None:
        self.process = subprocess.Popen(self._argv)

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                httpx.get(f"{self.url}/health").raise_for_status()
                return
            except httpx.TransportError:
                time.sleep(0.05)
        raise AssertionError(f"the server on port {self.port} did not become ready (exit code {self.process.poll()})")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        """Exit code after SIGTERM."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=30)
