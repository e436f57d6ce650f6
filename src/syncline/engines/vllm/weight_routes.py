"""What every weight bridge asks of an engine: pause, resume, receipts; and loads, exports and restarts."""

import asyncio
import os
import signal
from http import HTTPStatus
from typing import Any, Literal

from fastapi import APIRouter
from pydantic import Field

from syncline.bridges.receipt import model_digest
from syncline.engines.vllm.routes import Body, Order, Route
from syncline.engines.vllm.served import Restart, Served
from syncline.errors import EngineError
from syncline.protocols import Receipt


class PauseBody(Body):
    mode: Literal["drain", "abort", "keep"]
    timeout_seconds: float = Field(gt=0)
    reuse_kv: bool = False


class ReloadBody(Order):
    path: str
    expected: Receipt


class RestartBody(Order):
    path: str
    policy_version: int = Field(ge=0)


class ResumeBody(Order):
    expected: Receipt


class AdoptBody(Order):
    expected: Receipt
    resume: bool


def pause_routes(served: Served) -> APIRouter:
    """What the engine holds, and whether it samples."""
    router = APIRouter(route_class=Route)

    @router.get("/syncline/receipt")
    async def receipt() -> dict[str, Any]:
        return served.receipt()

    @router.get("/syncline/parameters")
    async def parameters() -> dict[str, Any]:
        return {**served.receipt(), "parameters": served.parameters}

    @router.post("/syncline/measure")
    async def measure() -> dict[str, Any]:
        measured = await served.measured()
        return {**served.receipt(), "digest": model_digest(measured), "parameters": measured}

    @router.post("/syncline/pause")
    async def pause(body: PauseBody) -> dict[str, Any]:
        pause = served.bridge_pause = served.gate.close()
        await served.pause(pause, body.mode, timeout_seconds=body.timeout_seconds, reuse_kv=body.reuse_kv)
        return {**served.receipt(), "generation": served.generation}

    @router.post("/syncline/resume")
    async def resume(body: ResumeBody) -> dict[str, Any]:
        served.refuse_late(body.pause)
        await served.resume(body.expected)
        return served.receipt()

    return router


def weight_routes(served: Served) -> APIRouter:
    """What replaces the weights of a paused engine, or opens them to others."""
    router = APIRouter(route_class=Route)

    @router.post("/syncline/export")
    async def export() -> list[dict[str, Any]]:
        if not served.shares:
            raise EngineError("this engine was not started to share its weights; set bridge.name to shared")
        return await served.each_rank("syncline_export")

    @router.post("/syncline/reload")
    async def reload(body: ReloadBody) -> dict[str, Any]:
        pause = served.need_paused("reload", body.pause)
        if served.adapters.num_slots:
            raise EngineError("an engine that serves adapters keeps its base; set bridge.name to lora or shared")
        served.refuse_backwards(body.expected.policy_version)
        served.tear(f"a reload of version {body.expected.policy_version} broke off")
        return await served.name(body.expected, "syncline_reload", body.path, pause=pause)

    @router.post("/syncline/adopt")
    async def adopt(body: AdoptBody) -> dict[str, Any]:
        pause = served.need_paused("adopt", body.pause)
        served.refuse_backwards(body.expected.policy_version)
        return await served.name(body.expected, pause=pause, resume=body.resume)

    @router.post("/syncline/restart", status_code=HTTPStatus.ACCEPTED)
    async def restart(body: RestartBody) -> dict[str, Any]:
        served.need_paused("restart", body.pause)
        served.restart_from = Restart(body.path, body.policy_version)
        asyncio.get_running_loop().call_later(0.1, os.kill, os.getpid(), signal.SIGTERM)
        return served.receipt()

    return router
