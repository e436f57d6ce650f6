"""The two ends that talk to the trajectory server: `TrajectorySink` (environments) and `TrajectorySource` (learner).

Every request can be repeated safely, so a server that is away (refused connection, 5xx) is tried again, ever more
slowly, until `retry_seconds` have passed; then a `TrajectoryError` says who did not answer and what for.
"""

import asyncio
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import httpx

from syncline.config.proxies import is_near
from syncline.errors import TrajectoryError
from syncline.protocols import Permit
from syncline.trajectory import wire
from syncline.types import RolloutGroup

log = logging.getLogger(__name__)
POLL_SECONDS = 20.0
PUTS_AT_ONCE = 4
"""Groups on their way, which keeps the server busy; with many, httpx looks through all of its connections for each."""
_ANSWER_SECONDS = 30.0
_COUNTERS = ("stale", "rewound", "failed", "abandoned", "expired_permits", "replaced", "unreplaced")


class Patience:
    """Decides after each try whether to accept, wait and repeat, or give up. Pure: time comes in through `clock`."""

    def __init__(self, what: str, *, retry_seconds: float, clock: Callable[[], float]) -> None:
        self._what = what
        self._clock = clock
        self._retry_seconds = retry_seconds
        self._deadline = clock() + retry_seconds
        self._pause = 0.1

    def pause(self, outcome: httpx.Response | httpx.TransportError) -> float | None:
        """Seconds to wait before the next try; `None` when the answer is good. Raises `TrajectoryError`."""
        if isinstance(outcome, httpx.Response):
            if outcome.status_code in (200, 429):
                return None
            if outcome.status_code < 500:
                raise TrajectoryError(f"{self._what}: refused ({outcome.status_code}): {_message(outcome)}")
            reason = f"status {outcome.status_code}: {_message(outcome)}"
        else:
            reason = f"{type(outcome).__name__}: {outcome}"
        if self._clock() + self._pause > self._deadline:
            raise TrajectoryError(f"{self._what}: no usable answer within {self._retry_seconds:g} s; last: {reason}")
        pause, self._pause = self._pause, min(2.0, 2 * self._pause)
        if pause < 2.0 <= self._pause:  # once, after some seconds
            log.warning("%s: %s; trying again for up to %g s", self._what, reason, self._retry_seconds)
        return pause


class TrajectorySink:
    """`RolloutSink` over HTTP. Use as an async context manager.

    `worker` names this sampling process among those of its environment. A process that starts under the name of a
    dead one takes its place: permits the dead one still held are handed out again at once. `num_tasks`: of a pass over
    the environment's tasks.
    """

    def __init__(
        self,
        url: str,
        *,
        worker: str = "0",
        num_tasks: int | None = None,
        token: str | None = None,
        retry_seconds: float = 60.0,
        transport: httpx.AsyncBaseTransport | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._url = url
        self._worker, self._num_tasks = worker, num_tasks
        self._retry_seconds = retry_seconds
        self._clock, self._sleep = clock, sleep
        self._http = httpx.AsyncClient(transport=transport, **_options(url, token))
        self._held: dict[str, set[str]] = {}
        self._asking = asyncio.Lock()
        self._putting = asyncio.Semaphore(PUTS_AT_ONCE)

    async def __aenter__(self) -> "TrajectorySink":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def permits(self, environment: str, num_permits: int, *, timeout_seconds: float) -> list[Permit]:
        """One request at a time: each tells the server which permits arrived, so none is lost with an answer."""
        async with self._asking:
            deadline = self._clock() + timeout_seconds
            while True:
                wait = min(max(0.0, deadline - self._clock()), POLL_SECONDS)
                held = self._held.setdefault(environment, set())
                ask: dict[str, Any] = {"environment": environment, "worker": self._worker, "num_permits": num_permits}
                ask |= {"num_tasks": self._num_tasks}
                body = wire.PermitsRequest(**ask, held=tuple(sorted(held)), timeout_seconds=wait)
                answer = await self._post("/permits", body.model_dump_json(), f"permits for {environment!r}")
                if answer.status_code == 200:
                    permits = list(wire.decode(wire.PermitsAnswer, answer.content).permits)
                    held.update(permit.permit_id for permit in permits)
                    return permits
                pause = float(answer.headers.get("Retry-After", 1))
                if self._clock() + pause >= deadline:
                    return []
                await self._sleep(pause)

    async def put(self, group: RolloutGroup, permit: Permit) -> None:
        what = f"group {group.group_id!r} of {group.environment!r}"
        path = f"/groups?permit_id={permit.permit_id}"
        async with self._putting:
            answer = await self._post(path, await asyncio.to_thread(wire.encode_group, group), what)
        if wire.decode(wire.PutAnswer, answer.content).outcome == "expired":
            late = "%s came after its permit's time (lease_seconds): task %d is sampled again"
            log.warning(late, what, permit.task_index)
        self._release(permit)

    async def give_back(self, permit: Permit, reason: str) -> None:
        """An empty `reason` says the permit was not used; any other counts as a failure of its task."""
        body = wire.GiveBackRequest(reason=reason).model_dump_json()
        await self._post(f"/permits/{permit.permit_id}/give_back", body, f"giving back task {permit.task_index}")
        self._release(permit)

    def _release(self, permit: Permit) -> None:
        for held in self._held.values():
            held.discard(permit.permit_id)

    async def _post(self, path: str, body: str | bytes, what: str) -> httpx.Response:
        what = f"trajectory server {self._url}: {what}"
        patience = Patience(what, retry_seconds=self._retry_seconds, clock=self._clock)
        while True:
            try:
                outcome: httpx.Response | httpx.TransportError = await self._http.post(path, content=body)
            except httpx.TransportError as error:
                outcome = error
            pause = patience.pause(outcome)
            if pause is None and isinstance(outcome, httpx.Response):
                return outcome
            await self._sleep(pause or 0.0)


class TrajectorySource:
    """`RolloutSource` over HTTP, for one learner process. Use as a context manager. `terms` tell a server that was
    started for no run what this one is."""

    def __init__(
        self,
        url: str,
        *,
        terms: wire.RunTerms | None = None,
        token: str | None = None,
        wait_timeout_seconds: float = 600.0,
        retry_seconds: float = 60.0,
        transport: httpx.BaseTransport | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._url = url
        self._learner = uuid.uuid4().hex
        self._terms = terms
        self._wait_timeout_seconds = wait_timeout_seconds
        self._retry_seconds = retry_seconds
        self._clock, self._sleep = clock, sleep
        self._http = httpx.Client(transport=transport, **_options(url, token))

    def __enter__(self) -> "TrajectorySource":
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def start(self, *, policy_version: int, step: int, resumed_version: int | None = None) -> None:
        body = wire.StartRequest(
            learner=self._learner,
            policy_version=policy_version,
            step=step,
            terms=self._terms,
            resumed_version=resumed_version,
        )
        self._ask("/start", body, f"start after step {step}")

    def next_batch(self, num_groups: int) -> list[RolloutGroup]:
        """Reads groups while the others are still sampled, so that few are left to read once the batch is whole."""
        deadline = self._clock() + self._wait_timeout_seconds
        lease_id, read = uuid.uuid4().hex, dict[str, RolloutGroup]()
        while True:
            wait, num_read = min(max(0.0, deadline - self._clock()), POLL_SECONDS), len(read)
            body = wire.LeaseRequest(
                learner=self._learner, lease_id=lease_id, num_groups=num_groups, timeout_seconds=wait, read=tuple(read)
            )
            answer = wire.decode(wire.LeaseAnswer, self._ask("/lease", body, f"a batch of {num_groups}").content)
            read |= {group.group_id: group for group in answer.groups}
            if answer.leased:
                return [read[group_id] for group_id in answer.leased]
            if len(read) == num_read and self._clock() >= deadline:
                raise TrajectoryError(
                    f"trajectory server {self._url}: no batch of {num_groups} groups within "
                    f"{self._wait_timeout_seconds:g} s (trajectory.wait_timeout_seconds): {answer.why_waiting}"
                )

    def acknowledge(self, groups: Sequence[RolloutGroup], *, step: int, policy_version: int) -> None:
        ids = tuple(group.group_id for group in groups)
        body = wire.AcknowledgeRequest(learner=self._learner, group_ids=ids, step=step, policy_version=policy_version)
        self._ask("/acknowledge", body, f"acknowledging step {step}")

    def commit(self, *, step: int) -> None:
        self._ask("/commit", wire.CommitRequest(learner=self._learner, step=step), f"committing step {step}")

    def metrics(self) -> dict[str, float]:
        """Groups waiting, passes over the tasks, and what the run has dropped or handed out again so far."""
        status = self._ask("/status", None, "status").json()
        told = {"queue/length": status["num_queued"]} | passes(status["environments"])
        return told | {f"queue/{name}": status["counters"][name] for name in _COUNTERS}

    def _ask(self, path: str, body: wire.WireMessage | None, what: str) -> httpx.Response:
        what = f"trajectory server {self._url}: {what}"
        patience = Patience(what, retry_seconds=self._retry_seconds, clock=self._clock)
        while True:
            try:
                outcome: httpx.Response | httpx.TransportError = (
                    self._http.post(path, content=body.model_dump_json()) if body else self._http.get(path)
                )
            except httpx.TransportError as error:
                outcome = error
            pause = patience.pause(outcome)
            if pause is None and isinstance(outcome, httpx.Response):
                return outcome
            self._sleep(pause or 0.0)


def passes(environments: Mapping[str, Any]) -> dict[str, float]:
    """`epoch`, as TRL counts it: tasks done with over those of a pass. Of several environments `epoch/NAME`, of those
    whose tasks have an end."""
    key = "epoch/{}" if len(environments) > 1 else "epoch"
    return {
        key.format(name): own["num_done"] / own["num_tasks"] for name, own in environments.items() if own["num_tasks"]
    }


def _options(url: str, token: str | None) -> Any:
    """What both ends tell httpx."""
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})
    return {"base_url": url, "headers": headers, "timeout": _ANSWER_SECONDS, "trust_env": not is_near(url)}


def _message(response: httpx.Response) -> str:
    try:
        return wire.decode(wire.ErrorAnswer, response.content).error
    except wire.Malformed:
        return response.text[:200]
