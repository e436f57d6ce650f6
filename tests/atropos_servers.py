"""A server of the Atropos wire inside the test's process: ours, or the one in `atroposlib`; and what one sends it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastapi.testclient import TestClient

from syncline.trajectory.app import build_app
from syncline.trajectory.ledger import QueueLimits
from syncline.trajectory.store import TrajectoryStore

LIMITS = QueueLimits(groups_per_step=2, rollouts_per_group=2, max_staleness=0, lease_seconds=600.0)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class AtroposServer:
    """Either server, asked as environments and trainers ask."""

    def __init__(self, http: TestClient, clock: Clock) -> None:
        self.http = http
        self.clock = clock

    def get(self, path: str, **options: Any) -> Any:
        return self.http.get(path, **options)

    def post(self, path: str, body: Any, **options: Any) -> Any:
        return self.http.post(path, json=body, **options)

    def register(self, *, batch_size: int = 4, **changes: Any) -> None:
        answer = self.post("/register", registration(batch_size=batch_size, **changes))
        assert answer.status_code == 200, answer.text
        assert isinstance(answer.json()["uuid"], int)

    def start(self, **changes: Any) -> None:
        """A trainer registers and asks for its first batch, which lets environments register."""
        self.register(**changes)
        self.get("/batch")

    def register_env(self, **changes: Any) -> int:
        answer = self.post("/register-env", environment(**changes)).json()
        assert answer["status"] == "success", answer
        return answer["env_id"]

    def push(self, *groups: dict[str, Any]) -> None:
        for group in groups:
            answer = self.post("/scored_data", group)
            assert answer.status_code == 200, answer.text

    def batch(self) -> list[int] | None:
        """What the groups of the next batch are marked with; `None` when there is none."""
        found = self.get("/batch").json()["batch"]
        return None if found is None else [group["tokens"][0][1] for group in found]

    def status_env(self, env_id: int) -> Any:
        return self.http.request("GET", "/status-env", json={"env_id": env_id})


def registration(**changes: Any) -> dict[str, Any]:
    names = {"wandb_group": "group", "wandb_project": "project", "checkpoint_dir": "checkpoints"}
    return {
        **names,
        "batch_size": 4,
        "max_token_len": 128,
        "save_checkpoint_interval": 5,
        "starting_step": 0,
        "num_steps": 100,
    } | changes


def environment(**changes: Any) -> dict[str, Any]:
    return {"max_token_length": 128, "desired_name": "math", "weight": 1.0, "group_size": 2} | changes


def scored(mark: int, size: int = 2, **changes: Any) -> dict[str, Any]:
    """A group of `size` sequences whose second token is `mark`."""
    return {
        "tokens": [[1, mark, 7 + i] for i in range(size)],
        "masks": [[-100, mark, 7 + i] for i in range(size)],
        "scores": [float(i) for i in range(size)],
        "inference_logprobs": [[1.0, -0.5, -0.25] for _ in range(size)],
    } | changes


@contextmanager
def our_server(
    folder: Path, *, limits: QueueLimits = LIMITS, weights: Mapping[str, float] | None = None, **options: Any
) -> Iterator[AtroposServer]:
    clock, weights = Clock(), weights or {}
    options = {"host": "127.0.0.1", "max_request_bytes": 1 << 20, "hold_seconds": 0.0} | options
    with TrajectoryStore(folder / "t.sqlite", run_id="run-1", limits=limits, weights=weights, clock=clock) as store:
        app = build_app(store, **options)
        with TestClient(app, base_url="http://127.0.0.1:8000", raise_server_exceptions=False) as http:
            yield AtroposServer(http, clock)


@contextmanager
def their_server() -> Iterator[AtroposServer]:
    """One app a process, so what the last test left in it is deleted."""
    from atroposlib.api.server import app

    app.state._state.clear()
    with TestClient(app, base_url="http://127.0.0.1:8000", raise_server_exceptions=False) as http:
        yield AtroposServer(http, Clock())
