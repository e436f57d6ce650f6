"""The trajectory server as a process: one socket, one run or several by name, until SIGTERM."""

import logging
import signal
import socket
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import uvicorn

from syncline.config.schema import Run, Trajectory
from syncline.errors import TrajectoryError
from syncline.trajectory.app import build_app
from syncline.trajectory.atropos_wire import Registration
from syncline.trajectory.guard import needed_token
from syncline.trajectory.ledger import QueueLimits
from syncline.trajectory.store import STORE_NAME, TrajectoryStore
from syncline.trajectory.tenants import Tenants

_SHUTDOWN_SECONDS = 5


class _Server(uvicorn.Server):
    """Ends long polls first: a shutdown must not wait a minute for them."""

    def __init__(self, app: Any, end_polls: Callable[[], Awaitable[None]]) -> None:
        config = uvicorn.Config(
            app, lifespan="off", log_level="warning", access_log=False, timeout_graceful_shutdown=_SHUTDOWN_SECONDS
        )
        super().__init__(config)
        self._end_polls = end_polls

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await self._end_polls()
        await super().shutdown(sockets)


def run_server(
    run: Run,
    trajectory: Trajectory,
    *,
    environments: Mapping[str, float],
    run_id: str,
    port: int | None = None,
    token: str | None = None,
    own: Registration | None = None,
) -> None:
    """Serves `<run.dir>/trajectories.sqlite` on `trajectory.host` until SIGTERM or SIGINT; writes nothing else.

    `environments` are the weights by name; `port` overrides `trajectory.port`, which may be 0 in a config but not
    here; `own` answers environments of the Atropos wire while the run's learner trains. Raises `TrajectoryError` when
    the port is taken, or the store is another run's or another process's, `ConfigError` where a token is missing.
    """
    token = needed_token(trajectory.host, token)
    port = trajectory.port if port is None else port
    limits = QueueLimits(
        groups_per_step=run.groups_per_step,
        rollouts_per_group=run.rollouts_per_group,
        max_staleness=run.max_staleness,
        lease_seconds=trajectory.lease_seconds,
        max_refills=run.max_refills,
        admits_environments=not environments,
    )
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    path = Path(run.dir) / STORE_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    with TrajectoryStore(
        path,
        run_id=run_id,
        limits=limits,
        weights=environments,
        clock=time.monotonic,
        max_bytes=trajectory.max_store_bytes,
    ) as store:
        app = build_app(
            store, host=trajectory.host, max_request_bytes=trajectory.max_request_bytes, token=token, own=own
        )
        with _listen(trajectory.host, port) as listener:
            _Server(app, app.state.turns.close).run(sockets=[listener])


def run_tenants(folder: Path, trajectory: Trajectory, *, port: int, token: str | None = None) -> None:
    """Serves the Atropos wire for as many runs as trainers begin, each in its part of `folder`, until SIGTERM. Raises
    as `run_server`."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with Tenants(folder, trajectory, token=token) as tenants, _listen(trajectory.host, port) as listener:
        logging.getLogger(__name__).info("listening on http://%s:%d; groups in %s", trajectory.host, port, folder)
        _Server(tenants, tenants.close).run(sockets=[listener])


def _listen(host: str, port: int) -> socket.socket:
    if port == 0:
        raise TrajectoryError("trajectory.port: 0 would be a port nobody knows; lease one and pass it on")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        raise TrajectoryError(f"trajectory.port: {host}:{port} cannot be used ({error}); choose another") from error
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # asyncio forgets it here: 40 ms an answer
    return listener
