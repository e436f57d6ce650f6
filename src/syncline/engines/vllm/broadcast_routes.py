"""The routes of the `broadcast` bridge: join a learner's group, take a version from it.

From the first byte received until the new weights are named they are of no version (`Served.torn`): a fault leaves the
engine paused, unable to resume, its parameters measured anew, and ready for the next learner's invitation.
"""

import time
from typing import Any

from fastapi import APIRouter
from pydantic import Field

from syncline.engines.vllm.routes import Body, Served, _name, _need_paused, _refuse_older
from syncline.errors import EngineError


class JoinBody(Body):
    invitation: dict[str, Any]
    first_rank: int = Field(ge=1)
    timeout_seconds: float = Field(gt=0)


class ReceiveBody(Body):
    generation: str = Field(min_length=1)
    policy_version: int = Field(ge=0)
    timeout_seconds: float = Field(gt=0)


def broadcast_routes(served: Served) -> APIRouter:
    router = APIRouter(prefix="/syncline/broadcast")

    @router.get("")
    async def membership() -> dict[str, Any]:
        parallel = served.engine.vllm_config.parallel_config
        return {"world_size": parallel.world_size, "generation": served.generation}

    @router.post("/join")
    async def join(body: JoinBody) -> dict[str, Any]:
        served.generation = ""
        answers = await served.engine.collective_rpc(
            "syncline_join", args=(body.invitation, body.first_rank, body.timeout_seconds)
        )
        _refuse_faults(answers)
        served.generation = body.invitation["generation"]
        [plan] = {answer["plan"] for answer in answers}
        return {"plan": plan}

    @router.post("/receive")
    async def receive(body: ReceiveBody) -> dict[str, Any]:
        _need_paused(served, "a broadcast")
        _refuse_older(served, body.policy_version)
        served.torn = f"a broadcast of version {body.policy_version} broke off"
        served.parameters = {}
        answers = await served.engine.collective_rpc("syncline_receive", args=(body.generation, body.timeout_seconds))
        started = time.perf_counter()
        await served.remeasure()
        if any(answers):
            served.generation = ""
        _refuse_faults(answers)
        await _name(served, body.policy_version)
        return {**served.receipt(), "prove_seconds": time.perf_counter() - started}

    return router


def _refuse_faults(answers: list[dict[str, str]]) -> None:
    """One line a worker that failed."""
    if faults := [answer["fault"] for answer in answers if "fault" in answer]:
        raise EngineError("\n".join(faults))
