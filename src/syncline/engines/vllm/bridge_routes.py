"""`/bridge/*`, as the server of Atropos' example trainer answers it: how the engine is, and pausing it by hand.

A pause by hand is the bridges' own: requests inside end first, others wait at the gate. A resume by hand ends a pause
by hand alone: an engine that a bridge has paused is for it to prove and resume.
"""

import time
from typing import Any

from fastapi import APIRouter, Request

from syncline.engines.vllm import compat
from syncline.engines.vllm.routes import Route
from syncline.engines.vllm.served import Served
from syncline.errors import EngineError, EngineTimeout

PAUSE_TIMEOUT_SECONDS = 300.0
NO_SLEEP = "this engine does not sleep: a learner may be training in the memory it would give away; stop it instead"


def bridge_routes(served: Served) -> APIRouter:
    router = APIRouter(route_class=Route)
    _add_pause(router, served)
    known = served.gate.policy_version
    since = time.time()

    @router.get("/bridge/info")
    async def info() -> dict[str, Any]:
        """`update_count` is the policy version: how many updates were published, and proved, since the first."""
        nonlocal known, since
        if known != served.gate.policy_version:
            known, since = served.gate.policy_version, time.time()
        return {
            "enabled": True,
            "shared_weights": served.shares,
            "update_count": max(0, known),
            "last_update_time": since,
            "model_name": served.about["model"],
            "device": served.about["device"],
            **served.receipt(),
        }

    @router.get("/bridge/state_dict_info")
    async def state_dict_info() -> dict[str, Any]:
        kinds = {name: digest.partition(":")[0] for name, digest in served.parameters.items()}
        dtypes = sorted({kind.partition("[")[0] for kind in kinds.values()})
        return {
            "model": served.about["model"],
            "dtype": ", ".join(dtypes),
            "shared_weights_enabled": served.shares,
            "parameters": kinds,
        }

    @router.get("/bridge/debug")
    async def debug() -> dict[str, Any]:
        return {"vllm_version": compat.vllm_version(), **served.about, "torn": served.torn, **served.receipt()}

    @router.get("/bridge/list_endpoints")
    async def list_endpoints(request: Request) -> dict[str, Any]:
        paths = {getattr(route, "path", "") for route in request.app.router.routes}
        return {"endpoints": sorted(path for path in paths if path)}

    return router


def _add_pause(router: APIRouter, served: Served) -> None:
    paused_as: int | None = None
    """Which pause is this hand's: a bridge that pauses the engine too has another."""

    @router.post("/bridge/pause")
    async def pause() -> dict[str, Any]:
        nonlocal paused_as
        if served.gate.is_open:
            paused_as = pause = served.gate.close()
            try:
                await served.pause(pause, "drain", timeout_seconds=PAUSE_TIMEOUT_SECONDS)
            except EngineTimeout:
                await served.go_on(pause)
                raise
        return {"status": "paused"}

    @router.post("/bridge/resume")
    async def resume() -> dict[str, Any]:
        if not served.gate.is_open and paused_as != served.gate.num_pauses:
            raise EngineError("a bridge has paused this engine to move its weights; it resumes it when they are proved")
        await served.resume(served.held)
        return {"status": "resumed"}

    @router.get("/bridge/is_paused")
    async def is_paused() -> dict[str, bool]:
        return {"paused": not served.gate.is_open}

    @router.post("/bridge/sleep")
    @router.post("/bridge/wake_up")
    async def sleep() -> None:
        raise EngineError(NO_SLEEP)

    @router.get("/bridge/is_sleeping")
    async def is_sleeping() -> dict[str, bool]:
        return {"sleeping": False}
