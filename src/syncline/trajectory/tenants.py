"""Several runs on one server, each under its name: `http://host:port/runs/NAME` is a server of the Atropos wire.

A run begins with its trainer's first POST /runs/NAME/register, keeps a store of its own in `<folder>/NAME`, and is
there again after a restart. What has no name in its path is the run `default`, so that clients who know nothing of
names find what they expect. Runs share a socket and a token, nothing else: what one holds, fills or resets is its own.
"""

import asyncio
import re
import time
from contextlib import ExitStack
from pathlib import Path

from fastapi import FastAPI
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from syncline.config.schema import Trajectory
from syncline.trajectory.app import build_app
from syncline.trajectory.guard import Guard, needed_token
from syncline.trajectory.ledger import QueueLimits
from syncline.trajectory.store import STORE_NAME, TrajectoryStore

DEFAULT = "default"
MAX_RUNS = 64
_PATH = re.compile(r"/runs/(?P<name>[A-Za-z0-9][A-Za-z0-9._-]{0,63})(?P<rest>/.*)?$")


class Tenants:
    """ASGI application. Use as a context manager; every store is held by this process until it ends."""

    def __init__(self, folder: Path, trajectory: Trajectory, *, token: str | None) -> None:
        self._folder, self._trajectory = folder, trajectory
        self._token = needed_token(trajectory.host, token)
        self._listing = Guard(self._list, token=self._token)
        self._stack = ExitStack()
        self._opening = asyncio.Lock()
        self._runs: dict[str, FastAPI] = {}

    def __enter__(self) -> "Tenants":
        self._folder.mkdir(parents=True, exist_ok=True)
        known = sorted(path.parent.name for path in self._folder.glob(f"*/{STORE_NAME}"))
        for name in dict.fromkeys([DEFAULT, *known]):
            self._open(name)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    async def close(self) -> None:
        """Ends all long polls, for a quick shutdown."""
        for app in self._runs.values():
            await app.state.turns.close()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        found = _PATH.match(scope.get("path", ""))
        if found is None:
            app = self._listing if scope.get("path") == "/runs" else self._runs[DEFAULT]
            return await app(scope, receive, send)
        name, rest = found["name"], found["rest"] or "/"
        begins = scope["method"] == "POST" and rest == "/register"
        await (await self._run(name, begins=begins))({**scope, "path": rest, "raw_path": rest.encode()}, receive, send)

    async def _run(self, name: str, *, begins: bool) -> FastAPI | JSONResponse:
        async with self._opening:
            if name not in self._runs and begins:
                if len(self._runs) >= MAX_RUNS:
                    return JSONResponse({"error": f"{MAX_RUNS} runs are here already; start another server"}, 409)
                await asyncio.to_thread(self._open, name)
        if name in self._runs:
            return self._runs[name]
        return JSONResponse({"error": f"no run {name!r}; its trainer begins it with POST /runs/{name}/register"}, 404)

    async def _list(self, scope: Scope, receive: Receive, send: Send) -> None:
        await JSONResponse({"runs": sorted(self._runs)})(scope, receive, send)

    def _open(self, name: str) -> None:
        folder = self._folder / name
        folder.mkdir(exist_ok=True)
        lease_seconds = self._trajectory.lease_seconds
        limits = QueueLimits(1, 2, 0, lease_seconds, admits_environments=True, admits_runs=True)
        store = self._stack.enter_context(
            TrajectoryStore(
                folder / STORE_NAME,
                run_id=name,
                limits=limits,
                weights={},
                clock=time.monotonic,
                max_bytes=self._trajectory.max_store_bytes,
            )
        )
        self._runs[name] = build_app(
            store, host=self._trajectory.host, max_request_bytes=self._trajectory.max_request_bytes, token=self._token
        )
