"""The trajectory server's routes: a request is checked, handed to the store, answered. Decisions are `queue`'s.

Requests run one after another, each in a thread because SQLite waits for the disk. A long poll (`/permits`, `/lease`)
tries, then sleeps on one condition; every request that changed the queue wakes all sleepers, and so do the next
expiry and `close`. Nobody sleeps past their own `timeout_seconds`, which is at most 60.
"""

import asyncio
import logging
import os
import sqlite3
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from typing import Annotated, Any, TypeVar

from fastapi import Depends, FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException as AnyHTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware

from syncline.protocols import Permit
from syncline.trajectory import atropos_run, wire
from syncline.trajectory.atropos import BODIES, HOLD_SECONDS, AtroposWire, add_atropos_routes, as_rollout_group
from syncline.trajectory.atropos_wire import Registration
from syncline.trajectory.guard import LARGE_BODIES, Guard, read_json
from syncline.trajectory.live import add_live_routes
from syncline.trajectory.openapi import describe, takes
from syncline.trajectory.prometheus import add_metrics_route
from syncline.trajectory.queue import PutOutcome, Refused, TrajectoryQueue
from syncline.trajectory.shares import Ask
from syncline.trajectory.status import queue_status, why_no_permit, why_waiting
from syncline.trajectory.store import StoreFull, TrajectoryStore, pack, unpack
from syncline.trajectory.tickets import Ticket
from syncline.trajectory.turns import Turns

RETRY_AFTER_SECONDS = 1
ANSWERS_A_BATCH = 4
"""To a learner that reads what is ready before its batch is whole: so much of a batch, at least, in each."""

log = logging.getLogger(__name__)

_FAULTS: dict[type[Exception], int | None] = {
    Refused: 409,
    StoreFull: 503,
    wire.Malformed: 422,
    RequestValidationError: 422,
    sqlite3.Error: 503,
    AnyHTTPException: None,
}
"""`None`: the fault knows its own status."""

_BODIES = (
    *(wire.PermitsRequest, wire.GiveBackRequest, wire.StartRequest),
    *(wire.LeaseRequest, wire.AcknowledgeRequest, wire.CommitRequest),
)

T = TypeVar("T")
M = TypeVar("M", bound=wire.WireMessage)


def build_app(
    store: TrajectoryStore,
    *,
    host: str,
    max_request_bytes: int,
    token: str | None = None,
    own: Registration | None = None,
    hold_seconds: float = HOLD_SECONDS,
) -> FastAPI:
    """`app.state.turns.close()` ends the long polls. Without a token `host` is the one clients name, beside the
    loopback names. `own` is what the run's learner would tell a server of Atropos'; an upload waits `hold_seconds`."""
    app = FastAPI(title="syncline trajectories", docs_url=None, redoc_url=None)
    if token is None:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=[host, "127.0.0.1", "localhost", "[::1]"])
    app.add_middleware(Guard, token=token)
    app.state.turns = Turns(store)
    app.state.max_request_bytes = max_request_bytes
    app.state.large_bodies = asyncio.Semaphore(LARGE_BODIES)
    for fault, status in _FAULTS.items():
        app.add_exception_handler(fault, _answer_with(status))
    _add_reports(app, store)
    _add_environment_routes(app, store)
    _add_learner_routes(app, store)
    add_atropos_routes(app, AtroposWire(store, app.state.turns, own, hold_seconds, max_request_bytes))
    add_live_routes(app, store, own)
    add_metrics_route(app, store)
    describe(app, [*BODIES, *_BODIES])
    return app


def _add_reports(app: FastAPI, store: TrajectoryStore) -> None:
    turns: Turns = app.state.turns

    @app.get("/health")
    async def health() -> dict[str, Any]:
        await asyncio.to_thread(store.check_writable)
        return {"ok": True, "pid": os.getpid(), "run_id": store.run_id, "wire_version": wire.WIRE_VERSION}

    @app.get("/status")
    async def status() -> dict[str, Any]:
        return await turns.take(lambda queue: asdict(queue_status(queue)) | atropos_run.status(queue))


def _add_environment_routes(app: FastAPI, store: TrajectoryStore) -> None:
    turns: Turns = app.state.turns

    @app.post("/permits", **takes(wire.PermitsRequest))
    async def permits(request: Request, body: Annotated[wire.PermitsRequest, _body(wire.PermitsRequest)]) -> Response:
        ask = Ask(body.environment, body.worker, body.num_permits, body.num_tasks)

        def grant(queue: TrajectoryQueue) -> list[Ticket]:
            return queue.grant(ask, room=store.room(queue))

        await turns.take(lambda queue: queue.ask(ask, held=body.held))
        try:
            granted = await turns.poll(grant, timeout_seconds=body.timeout_seconds, request=request)
        finally:
            await turns.take(lambda queue: queue.withdraw(ask))
        if not granted:
            why = await turns.take(lambda queue: store.why_full if store.room(queue) == 0 else why_no_permit(queue))
            raise HTTPException(429, why, headers={"Retry-After": str(RETRY_AFTER_SECONDS)})
        answer = wire.PermitsAnswer(permits=tuple(Permit(t.permit_id, t.task_index) for t in granted))
        return _json(answer.model_dump_json())

    @app.post("/groups", **takes(None))
    async def groups(permit_id: str, body: Annotated[bytes, Depends(read_json)]) -> Response:
        group, packed = await asyncio.to_thread(lambda: (wire.decode_group(body), pack(body)))
        outcome = await turns.take(lambda queue: store.put(queue, group, permit_id, packed=packed))
        if outcome is PutOutcome.UNREPLACED:
            log.warning(
                "%r: run.max_refills groups of equal rewards were replaced and more came; this step trains on them",
                group.environment,
            )
        return _json(wire.PutAnswer(outcome=outcome).model_dump_json())

    @app.post("/permits/{permit_id}/give_back", **takes(wire.GiveBackRequest))
    async def give_back(
        permit_id: str, body: Annotated[wire.GiveBackRequest, _body(wire.GiveBackRequest)]
    ) -> dict[str, Any]:
        await turns.take(lambda queue: queue.give_back(permit_id, body.reason))
        return {}


def _add_learner_routes(app: FastAPI, store: TrajectoryStore) -> None:
    turns: Turns = app.state.turns

    @app.post("/start", **takes(wire.StartRequest))
    async def start(body: Annotated[wire.StartRequest, _body(wire.StartRequest)]) -> dict[str, Any]:
        await turns.take(lambda queue: atropos_run.begin(queue, body))
        return {}

    @app.post("/lease", **takes(wire.LeaseRequest))
    async def lease(request: Request, body: Annotated[wire.LeaseRequest, _body(wire.LeaseRequest)]) -> Response:
        def action(queue: TrajectoryQueue) -> tuple[list[Ticket], list[bytes], list[str]] | None:
            tickets = queue.lease(body.num_groups, learner=body.learner, lease_id=body.lease_id)
            leased = [ticket.group_id or "" for ticket in tickets]
            if body.read is not None:
                tickets = [t for t in tickets or queue.ready()[: body.num_groups] if t.group_id not in body.read]
            is_worth_it = leased or len(tickets) * ANSWERS_A_BATCH >= body.num_groups
            return (tickets, store.payloads(tickets), leased) if is_worth_it else None

        found = await turns.poll(action, timeout_seconds=body.timeout_seconds, request=request)
        if found is None:
            why = await turns.take(lambda queue: _why_waiting(queue, store, body.num_groups))
            return _json(wire.lease_body([], why))
        return _json(await asyncio.to_thread(_lease_body, *found))

    @app.post("/acknowledge", **takes(wire.AcknowledgeRequest))
    async def acknowledge(body: Annotated[wire.AcknowledgeRequest, _body(wire.AcknowledgeRequest)]) -> dict[str, Any]:
        await turns.take(lambda queue: queue.acknowledge(**body.model_dump()))
        return {}

    @app.post("/commit", **takes(wire.CommitRequest))
    async def commit(body: Annotated[wire.CommitRequest, _body(wire.CommitRequest)]) -> dict[str, Any]:
        await turns.take(lambda queue: queue.commit(**body.model_dump()))
        return {}


def _lease_body(tickets: list[Ticket], packed: list[bytes], leased: list[str]) -> bytes:
    groups = [as_rollout_group(ticket, unpack(body)) for ticket, body in zip(tickets, packed, strict=True)]
    return wire.lease_body(groups, "", leased=leased)


def _why_waiting(queue: TrajectoryQueue, store: TrajectoryStore, num_groups: int) -> str:
    why = why_waiting(queue, num_groups)
    return f"{why}; {store.why_full}" if why and store.room(queue) == 0 else why


def _body(model: type[M]) -> Any:
    async def read(request: Request) -> M:
        return wire.decode(model, await read_json(request))

    return Depends(read)


def _json(text: str | bytes) -> Response:
    return Response(text, media_type="application/json")


def _answer_with(status: int | None) -> Callable[[Request, Exception], Awaitable[Response]]:
    """Every fault is answered as `{"error": message}`."""

    async def answer(_: Request, error: Exception) -> Response:
        message, headers = str(error), None
        if isinstance(error, AnyHTTPException):
            message, headers = error.detail, error.headers
        if isinstance(error, RequestValidationError):
            message = "; ".join(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors())
        code = status or getattr(error, "status_code", 500)
        return JSONResponse(wire.ErrorAnswer(error=message).model_dump(), code, headers)

    return answer
