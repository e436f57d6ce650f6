"""What a learner asked for, gave up on, and what then arrives after all: behind the pause that ended its publish."""

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from test_pause_routes import Core

from syncline.engines.client import EngineController
from syncline.engines.vllm import weight_routes
from syncline.engines.vllm.adapter_routes import adapter_routes
from syncline.engines.vllm.adapters import Adapters
from syncline.engines.vllm.bridge_routes import bridge_routes
from syncline.engines.vllm.broadcast_routes import broadcast_routes
from syncline.engines.vllm.gate import Gate
from syncline.engines.vllm.served import Served
from syncline.errors import EngineError, EngineTimeout
from syncline.protocols import Receipt


class Network(TestClient):
    """A wire to the engine that keeps what is sent on it while it `holds`, until whoever waits has given up."""

    holds = False
    held: Callable[[], httpx.Response]

    def request(self, *args: Any, timeout: float = 0.0, **options: Any) -> httpx.Response:  # type: ignore[override]
        del timeout
        if not self.holds:
            return super().request(*args, **options)
        self.holds, self.held = False, partial(super().request, *args, **options)
        raise httpx.ReadTimeout("no answer yet")


class Scene:
    """An engine of version 3 that samples, and a learner's end of its wire."""

    def __init__(self, served: Served, network: Network) -> None:
        self.served, self.network = served, network
        self.learner = self.connected()

    def connected(self) -> EngineController:
        learner = EngineController("http://engine", timeout_seconds=1)
        learner._http = self.network
        return learner

    def pause(self, mode: str = "abort") -> None:
        self.learner.pause(mode=mode, timeout_seconds=5)

    def late(self, ask: Callable[[EngineController], object]) -> httpx.Response:
        """The learner asks, gives up, and pauses the engine once more; only then what it had asked arrives."""
        self.network.holds = True
        with pytest.raises(EngineTimeout):
            ask(self.learner)
        self.pause()
        return self.network.held()

    @property
    def samples(self) -> bool:
        return self.served.gate.is_open


@pytest.fixture
def scene(monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    served, app = Served(Core(), Gate(3), {}, adapters=Adapters(2)), FastAPI()
    asyncio.run(served.remeasure())
    served.engine.calls.clear()
    monkeypatch.setattr(weight_routes.os, "kill", lambda *_: served.engine.calls.append("kill"))
    for router in (weight_routes.pause_routes, weight_routes.weight_routes, broadcast_routes, adapter_routes):
        app.include_router(router(served))
    app.include_router(bridge_routes(served))
    with Network(app, base_url="http://engine") as network:
        yield Scene(served, network)


HELD = Core().held(3)
RENAMED = Receipt(4, HELD.digest)
NEXT = Receipt(4, "4" * 64)
ADAPTER = {"layout": "", "source": {}}
ORDERS: dict[str, Callable[[EngineController], object]] = {
    "resume": lambda learner: learner.resume(HELD),
    "adopt": lambda learner: learner.adopt(RENAMED, resume=True),
    "reload": lambda learner: learner.reload("version-4", expected=NEXT, timeout_seconds=1),
    "restart": lambda learner: learner.restart("version-4", policy_version=4, timeout_seconds=1),
    "join": lambda learner: learner.join_broadcast({"generation": "g"}, first_rank=1, timeout_seconds=1),
    "receive": lambda learner: learner.receive_broadcast(NEXT, generation="g", timeout_seconds=1, resume=True),
    "stage": lambda learner: learner.stage(ADAPTER, policy_version=4, timeout_seconds=1),
    "switch": lambda learner: learner.switch(RENAMED),
}


@pytest.mark.parametrize("order", ORDERS)
def test_what_arrives_after_its_learner_gave_up_changes_nothing(scene: Scene, order: str) -> None:
    scene.pause("keep")
    late = scene.late(ORDERS[order])
    assert late.status_code == 409, late.text
    assert "asked in pause 1, and a bridge has begun pause 2 of it since" in late.text
    assert not scene.samples
    assert (scene.served.held, scene.served.engine.calls) == (HELD, [])


def test_a_resume_of_a_bridge_that_pauses_nothing_comes_late_too(scene: Scene) -> None:
    scene.learner.receipt()
    assert scene.late(ORDERS["resume"]).status_code == 409
    assert not scene.samples


def test_the_learner_goes_on_under_its_last_pause(scene: Scene) -> None:
    scene.pause("keep")
    scene.late(ORDERS["resume"])
    scene.learner.adopt(RENAMED, resume=True)
    assert scene.samples and scene.served.held.policy_version == 4


def test_another_learner_is_told_the_pause_it_finds(scene: Scene) -> None:
    scene.pause()
    scene.pause()
    scene.learner = scene.connected()
    scene.learner.resume(scene.learner.receipt())
    assert scene.samples


def test_who_names_no_pause_resumes_whichever_is_on(scene: Scene) -> None:
    scene.pause()
    answer = scene.network.post("/syncline/resume", json={"expected": asdict(HELD)})
    assert answer.is_success and scene.samples


def test_a_pause_by_hand_makes_no_bridge_late(scene: Scene) -> None:
    """A bridge that pauses nothing may meet one, and go on as if it were not there."""
    scene.learner.receipt()
    assert scene.network.post("/bridge/pause").is_success and not scene.samples
    scene.learner.resume(HELD)
    assert scene.samples


def test_a_resume_of_another_pause_is_told_which_is_on(scene: Scene) -> None:
    scene.pause()
    with pytest.raises(EngineError, match=r"409.*pause 3, and a bridge has begun pause 1 of"):
        scene.learner._call("POST", "/syncline/resume", {"expected": asdict(HELD), "pause": 3}, 1)
