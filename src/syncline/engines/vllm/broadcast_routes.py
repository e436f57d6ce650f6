"""The routes of the `broadcast` bridge: join a learner's group, take a version from it.

From the first byte received until the new weights are named they are of no version (`Served.torn`): a fault leaves the
engine paused, unable to resume, its digests unknown, and ready for the next learner's invitation.
"""

import logging
import time
from typing import Any

from fastapi import APIRouter
from pydantic import Field

from syncline.engines.vllm.routes import Order, Route
from syncline.engines.vllm.served import Served
from syncline.errors import EngineError, SyncError
from syncline.protocols import Receipt

log = logging.getLogger("syncline.engine")


class JoinBody(Order):
    invitation: dict[str, Any]
    first_rank: int = Field(ge=1)
    timeout_seconds: float = Field(gt=0)


class ReceiveBody(Order):
    expected: Receipt
    generation: str = Field(min_length=1)
    resume: bool
    timeout_seconds: float = Field(gt=0)


def broadcast_routes(served: Served) -> APIRouter:
    router = APIRouter(prefix="/syncline/broadcast", route_class=Route)

    @router.get("")
    async def membership() -> dict[str, Any]:
        parallel = served.engine.vllm_config.parallel_config
        return {"world_size": parallel.world_size, "generation": served.generation}

    @router.post("/join")
    async def join(body: JoinBody) -> dict[str, Any]:
        served.refuse_late(body.pause)
        served.generation = ""
        plans = await served.each_rank("syncline_join", body.invitation, body.first_rank, body.timeout_seconds)
        served.generation = body.invitation["generation"]
        return {"plan": plans[0]}

    @router.post("/receive")
    async def receive(body: ReceiveBody) -> dict[str, Any]:
        try:
            return await _receive(served, body)
        except (EngineError, SyncError):
            if served.generation == body.generation:  # a late fault leaves the next learner's group alone
                served.generation = ""
                await served.each_rank("syncline_leave")
            raise

    return router


async def _receive(served: Served, body: ReceiveBody) -> dict[str, Any]:
    pause = served.need_paused("a broadcast", body.pause)
    served.refuse_backwards(body.expected.policy_version)
    served.tear(f"a broadcast of version {body.expected.policy_version} broke off")
    try:
        await served.each_rank("syncline_receive", body.generation, body.timeout_seconds)
    except SyncError as error:
        served.torn = f"{served.torn}: {error}"
        log.error("%s", served.torn)
        raise
    started = time.perf_counter()
    receipt = await served.name(body.expected, pause=pause, resume=body.resume)
    return {**receipt, "prove_seconds": time.perf_counter() - started}
