"""The Atropos wire's routes: environments written for `atroposlib` push to us, trainers written for its API pull.

All of that wire's quirks stop here and in its two neighbours, `atropos_wire` (messages) and `atropos_run` (rules). Who
waits for whom: an upload that finds the queue full waits for room up to `HOLD_SECONDS`, in the order of the
environments' weights, and is told 429 after that; a trainer's GET /batch never waits. A batch is the trainer's once
its answer was sent whole; one that was cut off is sent again, under the same `batch_id`.
"""

import asyncio
import hashlib
import json
import uuid
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.responses import PlainTextResponse
from pydantic import TypeAdapter, ValidationError
from starlette.types import Receive, Scope, Send

from syncline.trajectory import atropos_run as rules
from syncline.trajectory import wire
from syncline.trajectory.atropos_wire import EnvIdentifier, RegisterEnv, Registration, ScoredData, from_group, to_group
from syncline.trajectory.guard import read_json
from syncline.trajectory.openapi import takes
from syncline.trajectory.queue import PutOutcome, Refused, TrajectoryQueue
from syncline.trajectory.shares import Ask
from syncline.trajectory.status import why_no_permit
from syncline.trajectory.store import TrajectoryStore, pack, unpack
from syncline.trajectory.tickets import Ticket, Wire
from syncline.trajectory.turns import Turns

HOLD_SECONDS = 240.0
"""Below the 300 s that atroposlib's client waits for an answer."""
RETRY_AFTER_SECONDS = 5
_CHUNK_BYTES = 1 << 16
_GRACE_SECONDS = 0.005
_DECODERS = 4
"""Bodies taken apart at once: what bounds the memory they take."""
_EMPTY_EXAMPLE = {
    **{"tokens": [], "masks": [], "scores": [], "advantages": [], "ref_logprobs": [], "generation_params": []},
    **{"inference_logprobs": [], "messages": [], "images": []},
}
_GROUP = TypeAdapter(ScoredData)
_GROUPS = TypeAdapter(list[ScoredData])
M = TypeVar("M")
BODIES = (Registration, RegisterEnv, EnvIdentifier, ScoredData)


class AtroposWire:
    """The wire's state outside the queue: what is being sent, and the last example."""

    def __init__(
        self,
        store: TrajectoryStore,
        turns: Turns,
        own: Registration | None,
        hold_seconds: float,
        max_waiting_bytes: int,
    ) -> None:
        """Uploads wait for room up to `hold_seconds`, and only as many as `max_waiting_bytes`, packed, can hold."""
        self.store, self.turns, self.own = store, turns, own
        self._hold_seconds, self._max_waiting_bytes = hold_seconds, max_waiting_bytes
        self._waiting_bytes = 0
        self._decoders = asyncio.Semaphore(_DECODERS)
        self.sending: set[str] = set()
        self.latest: bytes | None = None

    async def decode(self, adapter: TypeAdapter[M], body: bytes) -> M:
        async with self._decoders:
            return await asyncio.to_thread(_decode, adapter, body)

    async def pack(self, adapter: TypeAdapter[Any], body: bytes) -> list["Packed"]:
        """The groups of a body. Their numbers as Python has them take ten times their JSON, so they end here."""
        async with self._decoders:
            return await asyncio.to_thread(_pack, adapter, body)

    async def take(self, group: "Packed", request: Request) -> dict[str, Any]:
        """Stores a group and says so as theirs does; waits for room first. Raises 429."""
        upload = _Upload(self.store, group)
        try:
            if not await self.turns.take(lambda queue: upload.begin(queue, self.own)):
                await self._wait_for_room(upload, request)
        except rules.Busy as error:
            raise HTTPException(429, str(error), headers={"Retry-After": str(RETRY_AFTER_SECONDS)}) from error
        self.latest = group.body
        if await request.is_disconnected():
            await self.turns.take(upload.note_unanswered)
        return upload.answer

    async def _wait_for_room(self, upload: "_Upload", request: Request) -> None:
        num_bytes = len(upload.group.body)
        try:
            self._waiting_bytes += num_bytes
            if self._waiting_bytes > self._max_waiting_bytes:
                raise rules.Busy(f"{self._waiting_bytes} bytes of groups wait for room already")
            if not await self.turns.poll(upload.admit, timeout_seconds=self._hold_seconds, request=request):
                raise rules.Busy(await self.turns.take(upload.why_no_room))
        finally:
            self._waiting_bytes -= num_bytes
            await self.turns.take(upload.withdraw)

    def next_batch(self, queue: TrajectoryQueue) -> tuple[str, list[bytes]] | str:
        batch = rules.next_batch(queue, sending=self.sending)
        if isinstance(batch, str):
            return batch
        self.sending.add(batch.batch_id)
        bodies = self.store.payloads(batch.tickets)
        return batch.batch_id, [as_scored_data(t, unpack(body)) for t, body in zip(batch.tickets, bodies, strict=True)]

    async def sent(self, batch_id: str, *, whole: bool) -> None:
        try:
            if whole:
                await self.turns.take(lambda queue: rules.sent(queue, batch_id))
        finally:
            self.sending.discard(batch_id)


@dataclass(frozen=True, slots=True)
class Packed:
    """A group that was checked, as it is stored, and what must be known of it without unpacking."""

    env_id: int | None
    scores: Sequence[float]
    longest: int
    digest: str
    body: bytes

    @property
    def num_sequences(self) -> int:
        return len(self.scores)


def _decode(adapter: TypeAdapter[M], body: bytes) -> M:
    try:
        return adapter.validate_json(body)
    except ValidationError as error:
        raise wire.Malformed(wire.explain("body", error)) from error


def _pack(adapter: TypeAdapter[Any], body: bytes) -> list[Packed]:
    found = _decode(adapter, body)
    return [_packed(group) for group in (found if isinstance(found, list) else [found])]


def _packed(group: ScoredData) -> Packed:
    body = group.model_dump_json().encode()
    digest = hashlib.sha256(body).hexdigest()
    return Packed(group.env_id, group.scores, max(map(len, group.tokens)), digest, pack(body))


class _Upload:
    """One group on its way into the queue. Its methods are called inside the store's transactions."""

    def __init__(self, store: TrajectoryStore, group: Packed) -> None:
        self._store, self.group = store, group
        self._ask: Ask | None = None
        self.answer: dict[str, Any] = {"status": "received"}

    def begin(self, queue: TrajectoryQueue, own: Registration | None) -> bool:
        """Whether it is in, or was before. Raises `Refused`."""
        rules.check_size(queue, self.group.num_sequences, self.group.longest, own)
        if queue.state.policy_version < 0:
            raise rules.Busy(why_no_permit(queue))
        self._ask = Ask(rules.line_of(queue, self.group.env_id), uuid.uuid4().hex, 1)
        if queue.is_repetition(self.group.digest):
            return True
        queue.ask(self._ask, held=())
        return self.admit(queue)

    def admit(self, queue: TrajectoryQueue) -> bool:
        assert self._ask is not None
        if not self._store.has_room(len(self.group.body)):
            return False
        admitted = queue.admit(self._ask, rewards=self.group.scores, digest=self.group.digest)
        if admitted is None:
            return False
        ticket, outcome = admitted
        if outcome is PutOutcome.REPLACED:
            return True
        self._store.keep(ticket.permit_id, self.group.body)
        if self.group.env_id is not None:
            env = rules.find_env(queue, self.group.env_id)
            if self.group.num_sequences != env.group_size:
                self.answer = {"status": "buffered", "buffer_size": rules.awaiting_pack(queue, env)}
        return True

    def why_no_room(self, queue: TrajectoryQueue) -> str:
        return why_no_permit(queue) if self._store.has_room(len(self.group.body)) else self._store.why_full

    def withdraw(self, queue: TrajectoryQueue) -> None:
        if self._ask is not None:
            queue.withdraw(self._ask)

    def note_unanswered(self, queue: TrajectoryQueue) -> None:
        queue.note_unanswered(self.group.digest)


class _BatchAnswer(Response):
    """Reports whether the client was there for the last byte: it cannot have hung up content before that."""

    def __init__(self, body: bytes, report: Callable[[bool], Awaitable[None]]) -> None:
        super().__init__(body, media_type="application/json")
        self._report = report

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        whole = False
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            for start in range(0, len(self.body) - 1, _CHUNK_BYTES):
                piece = bytes(self.body[start : min(start + _CHUNK_BYTES, len(self.body) - 1)])
                await send({"type": "http.response.body", "body": piece, "more_body": True})
            whole = not await _is_gone(receive)
            await send({"type": "http.response.body", "body": bytes(self.body[-1:])})
        finally:
            await self._report(whole)


async def _is_gone(receive: Receive) -> bool:
    """Whether the client has hung up; a connection that broke just now takes a moment to be known as broken."""
    try:
        async with asyncio.timeout(_GRACE_SECONDS):
            while (await receive())["type"] != "http.disconnect":
                pass
    except TimeoutError:
        return False
    return True


def as_scored_data(ticket: Ticket, body: bytes) -> bytes:
    """A stored group as this wire writes it."""
    return body if ticket.wire is Wire.ATROPOS else from_group(wire.decode_group(body)).model_dump_json().encode()


def as_rollout_group(ticket: Ticket, body: bytes) -> bytes:
    """A stored group as our own wire writes it."""
    if ticket.wire is Wire.SYNCLINE:
        return body
    data = ScoredData.model_validate_json(body)
    group = to_group(
        data, group_id=ticket.group_id or ticket.permit_id, environment=ticket.environment, task_index=ticket.task_index
    )
    return wire.encode_group(group)


def add_atropos_routes(app: FastAPI, wire_state: AtroposWire) -> None:
    _add_trainer_routes(app, wire_state)
    _add_environment_routes(app, wire_state)
    _add_upload_routes(app, wire_state)


def _add_trainer_routes(app: FastAPI, at: AtroposWire) -> None:
    @app.get("/")
    async def root() -> dict[str, str]:
        return {"message": "AtroposLib API"}

    @app.post("/register", **takes(Registration))
    async def register(request: Request) -> dict[str, int]:
        asked = await at.decode(TypeAdapter(Registration), await read_json(request))
        await at.turns.take(lambda queue: rules.register(queue, asked))
        return {"uuid": uuid.uuid4().int}

    @app.get("/batch")
    async def batch() -> Response:
        if await at.turns.take(lambda queue: rules.registration(queue, at.own)) is None:
            message = "Trainer not registered. Call /register first."
            return _json({"status": "error", "message": message, "batch": []})
        found = await at.turns.take(at.next_batch)
        if isinstance(found, str):
            return _json({"batch": None, "why_waiting": found})
        batch_id, groups = found
        body = b'{"batch":[' + b",".join(groups) + b'],"batch_id":"' + batch_id.encode() + b'"}'
        return _BatchAnswer(body, lambda whole: at.sent(batch_id, whole=whole))

    @app.get("/latest_example")
    async def latest_example() -> Response:
        return Response(unpack(at.latest), media_type="application/json") if at.latest else _json(_EMPTY_EXAMPLE)

    @app.get("/reset_data")
    async def reset_data() -> PlainTextResponse:
        await at.turns.take(rules.reset)
        at.latest = None
        return PlainTextResponse("Reset successful")


def _add_environment_routes(app: FastAPI, at: AtroposWire) -> None:
    @app.get("/wandb_info")
    async def wandb_info() -> dict[str, str | None]:
        run = await at.turns.take(lambda queue: rules.registration(queue, at.own))
        return {"group": run and run.wandb_group, "project": run and run.wandb_project}

    @app.get("/info")
    async def info() -> dict[str, int]:
        run = await at.turns.take(lambda queue: rules.registration(queue, at.own))
        return {"batch_size": run.batch_size if run else -1, "max_token_len": run.max_token_len if run else -1}

    @app.post("/register-env", **takes(RegisterEnv))
    async def register_env(request: Request) -> dict[str, Any]:
        asked = await at.decode(TypeAdapter(RegisterEnv), await read_json(request))
        return await at.turns.take(lambda queue: rules.register_env(queue, asked, at.own))

    @app.post("/disconnect-env", **takes(EnvIdentifier))
    async def disconnect_env(request: Request) -> dict[str, Any]:
        env = await at.decode(TypeAdapter(EnvIdentifier), await read_json(request))
        try:
            await at.turns.take(lambda queue: rules.disconnect_env(queue, env.env_id))
        except rules.Unknown as error:
            return {"status": "failure", "error": str(error)}
        return {"status": "success"}

    @app.get("/status-env", **takes(EnvIdentifier))
    async def status_env(request: Request) -> dict[str, Any]:
        """`env_id` in a JSON body, as atroposlib sends it, or in the query."""
        query = request.query_params.get("env_id")
        body = await read_json(request) if query is None else b'{"env_id":' + query.encode() + b"}"
        env = await at.decode(TypeAdapter(EnvIdentifier), body)
        return await at.turns.take(lambda queue: rules.status_env(queue, env.env_id, at.own))


def _add_upload_routes(app: FastAPI, at: AtroposWire) -> None:
    @app.post("/scored_data", **takes(ScoredData))
    async def scored_data(request: Request) -> dict[str, Any]:
        [group] = await at.pack(_GROUP, await read_json(request))
        return await at.take(group, request)

    @app.post("/scored_data_list", **takes(ScoredData, many=True))
    async def scored_data_list(request: Request) -> dict[str, Any]:
        groups = await at.pack(_GROUPS, await read_json(request))
        answers: list[dict[str, Any]] = []
        try:
            for group in groups:
                answers.append(await at.take(group, request))
        except (HTTPException, Refused):
            taken = groups[: len(answers)]
            await at.turns.take(lambda queue: [queue.note_unanswered(group.digest) for group in taken])
            raise
        buffered = [answer["buffer_size"] for answer in answers if answer["status"] == "buffered"]
        answer: dict[str, Any] = {"status": "received", "groups_processed": len(groups)}
        return answer | ({"buffered": len(buffered), "last_buffer_size": buffered[-1]} if buffered else {})


def _json(content: Any) -> Response:
    return Response(json.dumps(content), media_type="application/json")
