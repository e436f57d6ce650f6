"""The routes over ASGI, no socket: statuses, messages, long polls. And what the clients make of answers that fail."""

import asyncio
import json
import math

import httpx
import pytest

from syncline.errors import TrajectoryError
from syncline.protocols import Permit
from syncline.testing import make_group
from syncline.trajectory import guard, wire
from syncline.trajectory.app import build_app
from syncline.trajectory.client import PUTS_AT_ONCE, TrajectorySink, TrajectorySource, passes
from syncline.trajectory.ledger import QueueLimits
from syncline.trajectory.store import TrajectoryStore

JSON = {"content-type": "application/json"}


class Server:
    """The app and an HTTP client to it, inside one event loop."""

    def __init__(self, store, *, max_request_bytes=100_000) -> None:
        self.app = build_app(store, host="127.0.0.1", max_request_bytes=max_request_bytes)
        self.http = httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url="http://127.0.0.1:1")

    async def post(self, path, **body):
        return await self.http.post(path, json=body)

    async def start(self, policy_version=0, step=0):
        return await self.post("/start", learner="L", policy_version=policy_version, step=step)

    async def permits(self, num_permits, *, timeout_seconds=0.0, held=(), environment="math"):
        body = {"num_permits": num_permits, "timeout_seconds": timeout_seconds, "held": held, "worker": "0"}
        return await self.post("/permits", environment=environment, **body)

    async def put(self, permit, **group):
        body = wire.encode_group(make_group("math", permit["task_index"], **group))
        return await self.http.post(f"/groups?permit_id={permit['permit_id']}", content=body, headers=JSON)

    async def lease(self, num_groups, *, timeout_seconds=0.0, lease_id="lease", read=None):
        body = {"num_groups": num_groups, "timeout_seconds": timeout_seconds, "read": read}
        return await self.post("/lease", learner="L", lease_id=lease_id, **body)


@pytest.fixture
def serve(tmp_path):
    """Runs a coroutine function against a fresh server. Nothing may take longer than 20 s: a lost wake-up fails."""

    def serve(scenario, *, max_refills=0, **options):
        limits = QueueLimits(2, rollouts_per_group=2, max_staleness=0, lease_seconds=100.0, max_refills=max_refills)
        path = tmp_path / "t.sqlite"
        weights = {"math": 1.0, "code": 1.0}
        with TrajectoryStore(path, run_id="run-1", limits=limits, weights=weights, clock=lambda: 0.0) as store:
            return asyncio.run(asyncio.wait_for(scenario(Server(store, **options)), 20))

    return serve


def test_a_whole_step_over_the_wire(serve):
    async def scenario(server):
        await server.start()
        permits = (await server.permits(2)).json()["permits"]
        assert [permit["task_index"] for permit in permits] == [0, 1]
        for permit in permits:
            assert (await server.put(permit)).json() == {"outcome": "accepted"}
        leased = wire.decode(wire.LeaseAnswer, (await server.lease(2)).content)
        assert list(leased.groups) == [make_group("math", 0), make_group("math", 1)]
        ids = [group.group_id for group in leased.groups]
        answer = await server.post("/acknowledge", learner="L", group_ids=ids, step=1, policy_version=1)
        assert (answer.status_code, answer.json()) == (200, {})
        assert (await server.post("/commit", learner="L", step=1)).status_code == 200
        status = (await server.http.get("/status")).json()
        assert (status["policy_version"], status["counters"]["trained"], status["num_queued"]) == (1, 2, 0)

    serve(scenario)


def test_the_learner_is_told_how_many_passes_its_tasks_make(serve):
    """Of a run with several environments each has its own; an endless one has none."""

    async def scenario(server):
        transport = httpx.ASGITransport(server.app)
        await server.start()
        async with TrajectorySink("http://127.0.0.1:1", transport=transport, num_tasks=8) as sink:
            for permit in await sink.permits("math", 2, timeout_seconds=0.0):
                await sink.put(make_group("math", permit.task_index), permit)
        leased = wire.decode(wire.LeaseAnswer, (await server.lease(2)).content)
        ids = [group.group_id for group in leased.groups]
        await server.post("/acknowledge", learner="L", group_ids=ids, step=1, policy_version=1)
        return passes((await server.http.get("/status")).json()["environments"])

    assert serve(scenario) == {"epoch/math": 2 / 8}
    alone = {"math": {"num_done": 12, "num_tasks": 8}}
    assert passes(alone) == {"epoch": 1.5}
    assert passes({"sums": {"num_done": 12, "num_tasks": None}}) == {}


def test_used_up_refills_are_said_once_a_step(serve, caplog):
    async def scenario(server):
        await server.start()
        for _ in range(2):
            for permit in (await server.permits(2)).json()["permits"]:
                outcome = (await server.put(permit, rewards=(1.0, 1.0))).json()["outcome"]
                told.append((outcome, len(caplog.messages)))

    told: list[tuple[str, int]] = []
    with caplog.at_level("WARNING", logger="syncline.trajectory.app"):
        serve(scenario, max_refills=1)
    assert told == [("replaced", 0), ("unreplaced", 1), ("accepted", 1)]
    assert "'math': run.max_refills groups of equal rewards were replaced" in caplog.messages[0]


def test_health_is_a_write(serve):
    async def scenario(server):
        answer = await server.http.get("/health")
        assert answer.status_code == 200
        assert answer.json()["run_id"] == "run-1"
        server.app.state.turns._store._db.execute("PRAGMA query_only = 1")
        answer = await server.http.get("/health")
        assert answer.status_code == 503
        assert "readonly" in answer.json()["error"]

    serve(scenario)


def test_no_permit_is_429_with_the_reason_and_retry_after(serve):
    async def scenario(server):
        early = await server.permits(1)
        assert (early.status_code, early.json()) == (429, {"error": "no learner has been heard since the server began"})
        await server.start()
        permits = (await server.permits(5)).json()["permits"]
        full = await server.permits(1, held=[permit["permit_id"] for permit in permits])
        assert (full.status_code, full.headers["retry-after"]) == (429, "1")
        assert "capacity of 2 groups is taken" in full.json()["error"]

    serve(scenario)


@pytest.mark.parametrize(
    ("old", "new", "where"),
    [
        (b"-0.25", b"NaN", "rollouts.0.samples.0.logprobs.2: input should be a finite number"),
        (b'"reward":1.0', b'"reward":Infinity', "rollouts.0.reward: input should be a finite number"),
        (b"[5,6,7]", b"[5,6]", "rollouts.0.samples.0: 2 token_ids but 3 loss_mask"),
        (b"[5,6,7]", b"[5,6,7.0]", "rollouts.0.samples.0.token_ids.2: input should be a valid integer"),
        (b'"start":1', b'"start":0', "rollouts.0.samples.0: version span"),
        (b'"end":3', b'"end":3,"x":1', "rollouts.0.samples.0.versions.0.x: unknown key"),
        (b'"reward":1.0', b'"reward":null', "rollouts.0: a rollout with status completed needs a reward"),
        (b'"task_index":0', b'"task_index":-1', "(whole message): task_index must be >= 0, got -1"),
        (b'"task_index":0', b'"task_index":"0"', "task_index: input should be a valid integer"),
        (b'{"group_id"', b'"group_id"', "(whole message): invalid JSON"),
    ],
)
def test_a_faulty_group_is_422_naming_the_field_and_nothing_is_stored(serve, old, new, where):
    async def scenario(server):
        await server.start()
        [permit] = (await server.permits(1)).json()["permits"]
        body = wire.encode_group(make_group("math", 0))
        assert old in body
        answer = await server.http.post(
            f"/groups?permit_id={permit['permit_id']}", content=body.replace(old, new), headers=JSON
        )
        assert answer.status_code == 422
        assert answer.json()["error"].startswith(f"RolloutGroup: {where}")
        assert (await server.http.get("/status")).json()["num_queued"] == 0
        assert (await server.put(permit)).json() == {"outcome": "accepted"}

    serve(scenario)


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        (
            "/start",
            {"learner": "L", "policy_version": -1, "step": 0},
            "StartRequest: policy_version: input should be gr",
        ),
        (
            "/start",
            {"learner": "L", "policy_version": 2**60, "step": 0},
            "StartRequest: policy_version: input should be l",
        ),
        ("/commit", {"learner": "L", "step": 0, "force": True}, "CommitRequest: force: unknown key"),
        ("/commit", {"learner": "L"}, "CommitRequest: step: field required"),
        (
            "/acknowledge",
            {"learner": "L", "group_ids": [], "step": 1, "policy_version": 1},
            "group_ids: tuple should hav",
        ),
        ("/permits/p/give_back", {"reason": 1}, "GiveBackRequest: reason: input should be a valid string"),
        ("/groups", {}, "query.permit_id: Field required"),
    ],
)
def test_a_faulty_request_is_422_naming_the_field(serve, path, body, message):
    async def scenario(server):
        answer = await server.post(path, **body)
        assert answer.status_code == 422
        assert message in answer.json()["error"]

    serve(scenario)


def test_what_contradicts_the_queue_is_409_with_its_reason(serve):
    async def scenario(server):
        await server.start()
        unknown = await server.put({"permit_id": "nope", "task_index": 0})
        stranger = await server.permits(1, environment="maths")
        other = await server.post("/commit", learner="M", step=0)
        assert [answer.status_code for answer in (unknown, stranger, other)] == [409, 409, 409]
        assert unknown.json()["error"].startswith("permit 'nope' is unknown")
        assert stranger.json()["error"].startswith("environment 'maths' is not part of this run")
        assert other.json()["error"].startswith("learner 'M' is not the one that started last")

    serve(scenario)


def test_a_body_over_the_limit_is_413_while_it_arrives(serve):
    async def chunks():
        for _ in range(20):
            yield b"x" * 10
        raise AssertionError("read on after the limit")

    async def scenario(server):
        answer = await server.http.post("/groups?permit_id=p", content=chunks(), headers=JSON)
        assert answer.status_code == 413
        assert "trajectory.max_request_bytes = 100" in answer.json()["error"]

    serve(scenario, max_request_bytes=100)


def test_a_body_that_does_not_arrive_gives_its_place_to_another(serve, monkeypatch):
    monkeypatch.setattr(guard, "BODY_SECONDS", 0.05)

    async def dribble():
        yield b"{"
        await asyncio.sleep(60)

    async def scenario(server):
        slow = [server.http.post("/start", content=dribble(), headers=JSON) for _ in range(guard.LARGE_BODIES + 1)]
        for answer in await asyncio.gather(*slow):
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
            assert answer.json()["error"].startswith("the body had not arrived after 0.05 s")
        assert (await server.start()).status_code == 200

    serve(scenario)


def test_web_pages_cannot_write(serve):
    """A page may send text/plain anywhere without asking, and reach loopback through a name it rebinds."""

    async def scenario(server):
        body = json.dumps({"learner": "L", "policy_version": 0, "step": 0})
        plain = await server.http.post("/start", content=body, headers={"content-type": "text/plain"})
        rebound = await server.http.post("/start", content=body, headers=JSON | {"host": "evil.example"})
        assert (plain.status_code, rebound.status_code) == (415, 400)
        assert (await server.http.get("/status")).json()["policy_version"] == -1

    serve(scenario)


def test_an_unknown_route_is_a_json_error(serve):
    async def scenario(server):
        answer = await server.http.get("/nothing")
        assert (answer.status_code, answer.json()) == (404, {"error": "Not Found"})

    serve(scenario)


def test_long_polls_are_woken_by_what_they_wait_for(serve):
    async def scenario(server):
        asked = asyncio.create_task(server.permits(2, timeout_seconds=60.0))
        leased = None
        await asyncio.sleep(0)
        await server.start()
        permits = (await asked).json()["permits"]
        leased = asyncio.create_task(server.lease(2, timeout_seconds=60.0))
        for permit in permits:
            await server.put(permit)
        groups = wire.decode(wire.LeaseAnswer, (await leased).content).groups
        held = [permit["permit_id"] for permit in permits]
        next_permits = asyncio.create_task(server.permits(1, timeout_seconds=60.0, held=held))
        await server.post(
            "/acknowledge", learner="L", group_ids=[group.group_id for group in groups], step=1, policy_version=1
        )
        assert [permit["task_index"] for permit in (await next_permits).json()["permits"]] == [2]

    serve(scenario)


def test_a_learner_reads_what_is_ready_before_its_batch_is_whole(serve):
    async def scenario(server):
        async def ask(*read):
            answer = wire.decode(wire.LeaseAnswer, (await server.lease(2, read=read)).content)
            return [group.group_id for group in answer.groups], answer.leased, bool(answer.why_waiting)

        await server.start()
        first, second = (await server.permits(2)).json()["permits"]
        assert await ask() == ([], (), True)
        await server.put(first)
        assert await ask() == (["math-0"], (), False)
        assert await ask("math-0") == ([], (), True)
        assert (await server.http.get("/status")).json()["num_leased"] == 0
        await server.put(second)
        assert await ask("math-0") == (["math-1"], ("math-0", "math-1"), False)
        assert await ask("math-1") == (["math-0"], ("math-0", "math-1"), False)
        assert (await server.http.get("/status")).json()["num_leased"] == 2

    serve(scenario)


def test_a_lease_that_waits_in_vain_says_who_owes(serve):
    async def scenario(server):
        await server.start()
        await server.permits(2)
        answer = wire.decode(wire.LeaseAnswer, (await server.lease(2)).content)
        assert answer.groups == ()
        assert answer.why_waiting == (
            "0 of 2 groups are queued for policy version 0: "
            "'math' owes 2 (last heard 0.0 s ago), 'code' owes 0 (never heard of)"
        )

    serve(scenario)


def test_closing_ends_long_polls(serve):
    async def scenario(server):
        asked = asyncio.create_task(server.permits(1, timeout_seconds=60.0))
        while not server.app.state.turns._changed._waiters:
            await asyncio.sleep(0)
        await server.app.state.turns.close()
        assert (await asked).status_code == 503

    serve(scenario)


# Clients against answers that fail


class Time:
    """A clock that only its own sleeps move."""

    def __init__(self) -> None:
        self.now = 0.0
        self.sleeps: list[float] = []

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.sleeps.append(seconds)
        self.now += seconds

    async def asleep(self, seconds: float) -> None:
        self.sleep(seconds)


def source(answer, time, **options) -> TrajectorySource:
    return TrajectorySource(
        "http://server", transport=httpx.MockTransport(answer), clock=time.clock, sleep=time.sleep, **options
    )


def sink(answer, time, **options) -> TrajectorySink:
    return TrajectorySink(
        "http://server", transport=httpx.MockTransport(answer), clock=time.clock, sleep=time.asleep, **options
    )


def test_a_server_that_is_away_is_tried_again_ever_more_slowly_then_named(caplog):
    def refuse(request):
        raise httpx.ConnectError("connection refused")

    time = Time()
    with pytest.raises(TrajectoryError) as caught:
        source(refuse, time, retry_seconds=10.0).commit(step=3)
    assert str(caught.value) == (
        "trajectory server http://server: committing step 3: no usable answer within 10 s; "
        "last: ConnectError: connection refused"
    )
    assert time.sleeps[:6] == [0.1, 0.2, 0.4, 0.8, 1.6, 2.0]
    assert 8.0 < time.now <= 10.0
    [told] = [record.getMessage() for record in caplog.records]
    assert told.endswith("committing step 3: ConnectError: connection refused; trying again for up to 10 s")


def test_a_lease_whose_answer_was_lost_is_asked_for_under_the_same_name():
    asked = []
    body = wire.lease_body([wire.encode_group(make_group("math", 0))], "", leased=["math-0"])

    def answer(request):
        asked.append(json.loads(request.content)["lease_id"])
        if len(asked) == 1:
            raise httpx.ReadError("connection reset")
        return httpx.Response(503 if len(asked) == 2 else 200, content=body)

    client = source(answer, Time())
    assert client.next_batch(1) == [make_group("math", 0)]
    assert len(asked) == 3
    assert len(set(asked)) == 1
    client.next_batch(1)
    assert asked[3] != asked[0]


def test_a_batch_is_read_as_it_comes_and_is_in_the_order_of_the_lease():
    groups = [make_group("math", i) for i in range(3)]
    told = [(groups[2:], ()), (groups[:1], ()), (groups[1:2], ("math-1", "math-2"))]
    asked = []

    def answer(request):
        asked.append(json.loads(request.content)["read"])
        some, leased = told[len(asked) - 1]
        return httpx.Response(200, content=wire.lease_body([*map(wire.encode_group, some)], "", leased=leased))

    assert source(answer, Time()).next_batch(2) == groups[1:]
    assert asked == [[], ["math-2"], ["math-2", "math-0"]]


def test_few_groups_are_on_their_way_at_once():
    async def scenario():
        now, most = 0, 0

        async def answer(request):
            nonlocal now, most
            now += 1
            most = max(most, now)
            for _ in range(20):
                await asyncio.sleep(0)
            now -= 1
            return httpx.Response(200, json={"outcome": "accepted"})

        client = sink(answer, Time())
        await asyncio.gather(*(client.put(make_group("math", i), Permit(str(i), i)) for i in range(12)))
        return most

    assert asyncio.run(scenario()) <= PUTS_AT_ONCE


def test_a_refusal_is_not_repeated():
    calls = []

    def answer(request):
        calls.append(request)
        return httpx.Response(409, json={"error": "permit 'p' is used up"})

    permit = Permit("p", 0)
    with pytest.raises(TrajectoryError, match=r"group 'math-0' of 'math': refused \(409\): permit 'p' is used up"):
        asyncio.run(sink(answer, Time()).put(make_group("math", 0), permit))
    assert len(calls) == 1


def test_a_group_that_comes_after_its_permits_time_is_told_of_and_the_task_goes_out_again(serve, caplog):
    async def late(server):
        await server.start()
        transport = httpx.ASGITransport(server.app)
        async with TrajectorySink("http://127.0.0.1", transport=transport) as sink:
            [permit, _] = await sink.permits("math", 2, timeout_seconds=0.0)
            await server.app.state.turns.take(lambda queue: expire(queue, permit.permit_id))
            await sink.put(make_group("math", permit.task_index), permit)
            [again] = await sink.permits("math", 2, timeout_seconds=0.0)
            assert (again.task_index, again.permit_id == permit.permit_id) == (permit.task_index, False)
            await sink.put(make_group("math", permit.task_index), again)

    def expire(queue, permit_id):
        queue.ledger._deadlines[permit_id] = 0.0
        queue.expire()

    serve(late)
    [told] = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert told == "group 'math-0' of 'math' came after its permit's time (lease_seconds): task 0 is sampled again"


def test_a_batch_that_does_not_come_is_an_error_that_says_who_owes():
    time = Time()

    def answer(request):
        time.now += json.loads(request.content)["timeout_seconds"]
        return httpx.Response(200, content=wire.lease_body([], "'math' owes 2"))

    with pytest.raises(TrajectoryError, match=r"no batch of 2 groups within 50 s .*: 'math' owes 2"):
        source(answer, time, wait_timeout_seconds=50.0).next_batch(2)
    assert math.isclose(time.now, 50.0)


def test_429_is_waited_out_as_long_as_the_caller_allows():
    time = Time()
    answers = [httpx.Response(429, headers={"Retry-After": "3"}, json={"error": "full"}) for _ in range(9)]
    assert asyncio.run(sink(lambda _: answers.pop(), time).permits("math", 1, timeout_seconds=7.0)) == []
    assert time.sleeps == [3.0, 3.0]


def test_permits_say_which_permits_the_worker_holds():
    held = []
    permit = {"permit_id": "p1", "task_index": 4}

    def answer(request):
        if request.url.path == "/permits":
            held.append(json.loads(request.content)["held"])
            return httpx.Response(200, json={"permits": [permit]})
        return httpx.Response(200, json={"outcome": "accepted"})

    async def scenario():
        client = sink(answer, Time())
        [granted] = await client.permits("math", 1, timeout_seconds=1.0)
        await client.permits("math", 1, timeout_seconds=1.0)
        await client.put(make_group("math", 4), granted)
        await client.permits("math", 1, timeout_seconds=1.0)

    asyncio.run(scenario())
    assert held == [[], ["p1"], []]
