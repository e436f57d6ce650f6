"""Pauses that meet: by hand, by a bridge, by one whose learner has given up. The gate and the engine core agree always,
and whoever was overtaken is told so."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from test_served import Engine

from syncline.engines.vllm import bridge_routes
from syncline.engines.vllm.broadcast_routes import broadcast_routes
from syncline.engines.vllm.gate import Gate
from syncline.engines.vllm.served import Served
from syncline.engines.vllm.weight_routes import pause_routes, weight_routes

KEEP, ABORT = ({"mode": mode, "timeout_seconds": 5} for mode in ("keep", "abort"))


class Core(Engine):
    """As much of vLLM as pauses ask for, too: it stops when it is told to, once it `answers`; so do its `workers`."""

    def __init__(self) -> None:
        super().__init__()
        self.is_stopped = False
        self.answers, self.workers = asyncio.Event(), asyncio.Event()
        self.answers.set()
        self.workers.set()
        self.engine_core = SimpleNamespace(pause_scheduler_async=self.stop, outputs_queue=None)
        self.output_processor = SimpleNamespace(request_states={}, has_unfinished_requests=lambda: False)
        self.model_config = SimpleNamespace(is_multimodal_model=False)
        self.vllm_config.kv_transfer_config = None

    async def stop(self, *, mode: str, clear_cache: bool) -> None:
        await self.answers.wait()
        self.is_stopped = True

    async def collective_rpc(self, method: str, args: tuple[Any, ...] = ()) -> list[dict[str, Any]]:
        await self.workers.wait()
        if method in ("syncline_receive", "syncline_leave"):
            self.calls.append(method)
            return [{"value": None}] * 2
        if method == "syncline_reload":
            self.models[0]["w"].data.add_(1)
            raise RuntimeError("the second rank's file breaks off")
        return await super().collective_rpc(method, args)

    async def resume_generation(self) -> None:
        self.is_stopped = False


class Scene:
    """An engine of version 3 with its routes, and one request inside until `ends`."""

    def __init__(self, http: httpx.AsyncClient, served: Served) -> None:
        self.served, self.gate, self.engine = served, served.gate, served.engine
        self._http = http
        self.ends = asyncio.Event()

    async def ask(self, path: str, /, **body: Any) -> httpx.Response:
        return await self._http.post(path, json=body)

    async def begin(self, path: str, /, **body: Any) -> asyncio.Task[httpx.Response]:
        """Asks, and goes on when the answer waits for something else."""
        asked = asyncio.create_task(self.ask(path, **body))
        await settled()
        assert not asked.done()
        return asked

    async def resume(self) -> httpx.Response:
        return await self.ask("/syncline/resume", expected=self.expected(3))

    def expected(self, policy_version: int) -> dict[str, Any]:
        return asdict(self.engine.held(policy_version))

    async def request(self) -> None:
        async with self.gate.request("a") as visit:
            await self.gate.submitted(visit)
            await self.ends.wait()

    def state(self) -> str:
        """One word for a gate and a core that agree."""
        told = (self.gate.is_open, self.gate.is_still, self.engine.is_stopped)
        return {(True, False, False): "samples", (False, True, True): "paused"}[told]


async def settled() -> None:
    for _ in range(200):
        await asyncio.sleep(0)


@asynccontextmanager
async def scene_with_a_request() -> AsyncIterator[Scene]:
    served, app = Served(Core(), Gate(3), {}), FastAPI()
    await served.remeasure()
    for router in (pause_routes, weight_routes, broadcast_routes, bridge_routes.bridge_routes):
        app.include_router(router(served))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://engine") as http:
        scene = Scene(http, served)
        running = asyncio.create_task(scene.request())
        await settled()
        yield scene
        scene.ends.set()
        await running


def play(story: Callable[[Scene], Awaitable[None]]) -> None:
    async def whole() -> None:
        async with scene_with_a_request() as scene:
            await story(scene)

    asyncio.run(whole())


def test_a_pause_by_hand_that_a_bridge_overtook_leaves_the_engine_sampling() -> None:
    async def story(scene: Scene) -> None:
        by_hand = await scene.begin("/bridge/pause")
        assert (await scene.ask("/syncline/pause", **KEEP)).is_success
        assert (await scene.resume()).is_success
        scene.ends.set()
        answer = await by_hand
        assert (answer.status_code, scene.state()) == (409, "samples")
        assert "has been resumed meanwhile" in answer.text

    play(story)


def test_a_pause_by_hand_does_not_take_over_a_bridges_pause() -> None:
    async def story(scene: Scene) -> None:
        by_hand = await scene.begin("/bridge/pause")
        assert (await scene.ask("/syncline/pause", **KEEP)).is_success
        scene.ends.set()
        answer = await by_hand
        assert (answer.status_code, scene.state()) == (409, "paused")
        assert "has been paused again meanwhile" in answer.text
        assert "a bridge has paused" in (await scene.ask("/bridge/resume")).text

    play(story)


def test_a_pause_by_hand_that_requests_outlast_did_not_happen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bridge_routes, "PAUSE_TIMEOUT_SECONDS", 0.01)

    async def story(scene: Scene) -> None:
        answer = await scene.ask("/bridge/pause")
        assert (answer.status_code, scene.state()) == (504, "samples")
        assert "1 requests were still running" in answer.text
        scene.ends.set()
        await settled()
        assert (await scene.ask("/bridge/pause")).is_success and scene.state() == "paused"
        assert (await scene.ask("/bridge/resume")).is_success and scene.state() == "samples"

    play(story)


def test_a_resume_by_hand_ends_its_pause_that_still_waits() -> None:
    async def story(scene: Scene) -> None:
        by_hand = await scene.begin("/bridge/pause")
        assert (await scene.ask("/bridge/resume")).is_success
        scene.ends.set()
        assert ((await by_hand).status_code, scene.state()) == (409, "samples")

    play(story)


@pytest.mark.parametrize("twice", [False, True])
def test_what_comes_while_the_core_stops_waits_for_it(twice: bool) -> None:
    """Otherwise the core would stop behind an open gate: every request would hang."""

    async def story(scene: Scene) -> None:
        scene.engine.answers.clear()
        pausing = [await scene.begin("/syncline/pause", **KEEP) for _ in range(1 + twice)]
        resuming = asyncio.create_task(scene.resume())
        await settled()
        assert not scene.gate.is_open and not resuming.done()
        scene.engine.answers.set()
        assert [(await pause).status_code for pause in pausing] == [409, 200][-len(pausing) :]
        assert (await resuming).is_success
        assert scene.state() == "samples"

    play(story)


RECEIVE = {"generation": "g", "timeout_seconds": 5}


@pytest.mark.parametrize(
    ("path", "body"),
    [("/syncline/adopt", {}), ("/syncline/broadcast/receive", RECEIVE)],
    ids=["adopt", "receive"],
)
def test_a_proof_that_comes_after_its_learner_gave_up_samples_nothing(path: str, body: dict[str, Any]) -> None:
    """At its deadline the learner raises and pauses every engine; nobody cancels what the engine was doing."""

    async def story(scene: Scene) -> None:
        scene.ends.set()
        assert (await scene.ask("/syncline/pause", **KEEP)).is_success
        scene.engine.workers.clear()
        late = await scene.begin(path, expected=scene.expected(4), resume=True, **body)
        assert (await scene.ask("/syncline/pause", **ABORT)).is_success
        scene.engine.workers.set()
        answer = await late
        assert answer.status_code == 409
        assert "has been paused again meanwhile" in answer.text
        assert (scene.state(), scene.gate.policy_version) == ("paused", 3), "what was not proved in time has no version"

    play(story)


@pytest.mark.parametrize("group", ["g", "the next learner's"])
def test_a_broadcast_that_breaks_off_leaves_its_own_group_alone(group: str) -> None:
    async def story(scene: Scene) -> None:
        scene.ends.set()
        assert (await scene.ask("/syncline/pause", **KEEP)).is_success
        scene.engine.workers.clear()
        late = await scene.begin("/syncline/broadcast/receive", expected=scene.expected(4), resume=True, **RECEIVE)
        assert (await scene.ask("/syncline/pause", **ABORT)).is_success
        scene.served.generation = group
        scene.engine.workers.set()
        await late
        assert scene.served.generation == ("" if group == "g" else group)
        assert ("syncline_leave" in scene.engine.calls) == (group == "g")

    play(story)


async def overtaken_resume(scene: Scene) -> httpx.Response:
    """Its workers still measure when the learner gives up and pauses again."""
    scene.ends.set()
    assert (await scene.ask("/syncline/pause", **KEEP)).is_success
    scene.engine.workers.clear()
    late = await scene.begin("/syncline/resume", expected=scene.expected(3))
    assert (await scene.ask("/syncline/pause", **ABORT)).is_success
    scene.engine.workers.set()
    return await late


def test_a_late_resume_samples_nothing() -> None:
    async def story(scene: Scene) -> None:
        late = await overtaken_resume(scene)
        assert (late.status_code, scene.state()) == (409, "paused")

    play(story)


def test_what_was_measured_before_a_pause_proves_nothing_after_it() -> None:
    """The late answer to one who gave up must not pass for a proof of what a step has written since."""

    async def story(scene: Scene) -> None:
        await overtaken_resume(scene)
        scene.engine.models[0]["w"].data.add_(1)
        again = await scene.ask("/syncline/resume", expected=asdict(scene.served.held))
        assert (again.status_code, scene.state()) == (409, "paused")
        assert "have changed since" in again.text

    play(story)


def test_a_reload_that_breaks_off_leaves_weights_of_no_version() -> None:
    async def story(scene: Scene) -> None:
        scene.ends.set()
        assert (await scene.ask("/syncline/pause", **KEEP)).is_success
        before = scene.expected(3)
        with pytest.raises(RuntimeError, match="breaks off"):
            await scene.ask("/syncline/reload", path="version-4", expected=scene.expected(4))
        held = scene.served.held
        assert held.policy_version == -1 and held.digest != before["digest"]
        answer = await scene.ask("/syncline/resume", expected=before)
        assert (answer.status_code, scene.state()) == (409, "paused")
        assert "of no version; publish one instead of resuming: a reload of version 4 broke off" in answer.text

    play(story)
