"""Our routes beside vLLM's own: sampling with versions, and what the weight bridges ask of an engine.

All bind to the gate (`gate.py`): `generate` passes it, `pause` closes it, the weight routes need it closed.
"""

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, Literal
from uuid import uuid4

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from pydantic import BaseModel, ConfigDict, Field

from syncline.bridges.adapter import is_adapter_name
from syncline.bridges.receipt import combined, model_digest
from syncline.engines.vllm import compat
from syncline.engines.vllm.adapters import Adapter, Adapters
from syncline.engines.vllm.gate import UNPUBLISHED, Gate, Visit
from syncline.errors import EngineError, EngineTimeout, SyncError
from syncline.types import SamplingParams

HEALTH_TIMEOUT_SECONDS = 5.0


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class GenerateBody(Body):
    prompt_token_ids: tuple[int, ...] = Field(min_length=1)
    sampling: SamplingParams
    num_completions: int = Field(default=1, ge=1)


class PauseBody(Body):
    mode: Literal["drain", "abort", "keep"]
    timeout_seconds: float = Field(gt=0)


class WeightsBody(Body):
    path: str
    policy_version: int = Field(ge=0)


class ExportBody(Body):
    fused: bool = False


class AdoptBody(Body):
    policy_version: int = Field(ge=0)


@dataclass(slots=True)
class Served:
    """The engine behind the routes and what is proved of its weights."""

    engine: Any
    gate: Gate
    about: dict[str, str]
    shares: bool = False
    """Other processes may open its weights."""
    adapters: Adapters = field(default_factory=Adapters)
    parameters: dict[str, str] = field(default_factory=dict)
    is_measured: bool = False
    """`parameters` tells what the engine holds now; not so once it was paused, when somebody may write the weights."""
    restart_from: WeightsBody | None = None
    generation: str = ""
    """Of the learner's process group the workers are in; empty: in none."""
    torn: str | None = None
    """Why the weights are of no version: somebody began to replace them. Naming them ends it, nothing else does."""

    async def measured(self, method: str = "syncline_parameters", *args: Any) -> dict[str, str]:
        """What the next request would be sampled from: the weights, and the adapter that is current."""
        measured = combined(await self.each_rank(method, *args))
        if current := self.adapters.current:
            [held] = await self.each_rank("syncline_held", current.id)
            measured |= held
        return measured

    async def each_rank(self, method: str, *args: Any) -> list[Any]:
        """What every tensor-parallel rank answers, in rank order. Raises `SyncError` with what a rank cannot do."""
        answers = await self.engine.collective_rpc(method, args=args)
        faults = [f"rank {rank}: {answer['fault']}" for rank, answer in enumerate(answers) if "fault" in answer]
        if faults:
            raise SyncError("\n".join(faults))
        return [answer["value"] for answer in answers]

    async def remeasure(self, method: str = "syncline_parameters", *args: Any) -> None:
        self.parameters = await self.measured(method, *args)
        self.is_measured = True

    def base_parameters(self) -> dict[str, str]:
        return {name: digest for name, digest in self.parameters.items() if not is_adapter_name(name)}

    def sample_from_current(self) -> None:
        """`parameters` are the base's and those of the adapter that new requests get."""
        current = self.adapters.current
        self.parameters = self.base_parameters() | (current.parameters if current else {})

    def refuse_backwards(self, policy_version: int) -> None:
        if policy_version < self.gate.policy_version:
            raise EngineError(
                f"policy_version {policy_version} is older than {self.gate.policy_version}, which this engine served"
            )

    async def refuse_unproved(self) -> None:
        """Raises `EngineError` when the weights are no longer those of the version they were named with."""
        if self.is_measured:
            return
        if await self.measured() != self.parameters:
            raise EngineError(
                f"the weights have changed since they were named version {self.gate.policy_version}; publish a new "
                "version instead of resuming"
            )
        self.is_measured = True

    def tear(self, why: str) -> None:
        """Until they are named anew the weights have no version, and no digest that anybody measured."""
        self.torn = why
        self.parameters = {name: f"{digest.partition(':')[0]}:torn" for name, digest in self.parameters.items()}

    def receipt(self) -> dict[str, Any]:
        return {
            "policy_version": UNPUBLISHED if self.torn or self.adapters.by_hand else self.gate.policy_version,
            "digest": model_digest(self.parameters),
            "paused": not self.gate.is_open,
        }


def add_routes(app: FastAPI, served: Served) -> None:
    """Adds `/syncline/*` and puts our `/health` before vLLM's."""
    app.include_router(_sampling_routes(served))
    app.include_router(_weight_routes(served))
    health = [route for route in app.router.routes if getattr(route, "path", None) == "/health"]
    app.router.routes = [health[-1], *(r for r in app.router.routes if r not in health)]


class Route(APIRoute):
    """Answers our own errors: by the time we get vLLM's app, its error handlers may be fixed."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def answer(request: Request) -> Response:
            try:
                return await handle(request)
            except (EngineError, SyncError) as error:
                status = HTTPStatus.GATEWAY_TIMEOUT if isinstance(error, EngineTimeout) else HTTPStatus.CONFLICT
                return JSONResponse({"error": str(error)}, status_code=status)

        return answer


def _sampling_routes(served: Served) -> APIRouter:
    from vllm.entrypoints.serve.utils.api_utils import with_cancellation

    router = APIRouter(route_class=Route)

    @router.get("/health")
    async def health() -> JSONResponse:
        fault = await _fault(served.engine)
        body = {"status": fault or "ok", **served.about, **served.receipt(), "torn": served.torn}
        return JSONResponse(body, status_code=HTTPStatus.SERVICE_UNAVAILABLE if fault else HTTPStatus.OK)

    @router.post("/syncline/generate")
    @with_cancellation
    async def generate(body: GenerateBody, raw_request: Request) -> JSONResponse:
        del raw_request
        can_freeze = compat.can_freeze(seed=body.sampling.seed)
        async with served.gate.request(f"syncline-{uuid4().hex}", can_freeze=can_freeze) as visit:
            with served.adapters.running() as adapter:
                if adapter is not None and adapter is served.adapters.by_hand:
                    visit.entered_under = UNPUBLISHED
                return JSONResponse(await _sample(served, body, visit, adapter))

    return router


def _weight_routes(served: Served) -> APIRouter:
    router = APIRouter(route_class=Route)

    @router.get("/syncline/parameters")
    async def parameters() -> dict[str, Any]:
        return {**served.receipt(), "parameters": served.parameters}

    @router.post("/syncline/measure")
    async def measure() -> dict[str, Any]:
        measured = await served.measured()
        return {**served.receipt(), "digest": model_digest(measured), "parameters": measured}

    @router.post("/syncline/pause")
    async def pause(body: PauseBody) -> dict[str, Any]:
        await served.gate.close()
        wait = {
            "drain": served.gate.wait_until_empty,
            "keep": served.gate.wait_until_freezable,
            "abort": served.gate.wait_until_submitted,
        }[body.mode]
        await wait(timeout_seconds=body.timeout_seconds)
        await _within(body.timeout_seconds, compat.pause(served.engine, body.mode), "stop sampling")
        if body.mode != "keep":
            await served.gate.wait_until_empty(timeout_seconds=body.timeout_seconds)
        served.gate.freeze()
        served.is_measured = False
        return served.receipt()

    @router.post("/syncline/resume")
    async def resume() -> dict[str, Any]:
        if served.torn:
            raise EngineError(f"the weights are of no version; publish one instead of resuming: {served.torn}")
        if served.gate.is_open:
            return served.receipt()
        await served.refuse_unproved()
        await served.engine.resume_generation()
        await served.gate.open()
        return served.receipt()

    @router.post("/syncline/export")
    async def export(body: ExportBody) -> list[dict[str, Any]]:
        if not served.shares:
            raise EngineError("this engine was not started to share its weights; set bridge.name to shared")
        return await served.each_rank("syncline_export", body.fused)

    @router.post("/syncline/reload")
    async def reload(body: WeightsBody) -> dict[str, Any]:
        _need_paused(served, "reload")
        if served.adapters.num_slots:
            raise EngineError("an engine that serves adapters keeps its base; set bridge.name to lora or shared")
        await served.remeasure("syncline_reload", body.path)
        return await _name(served, body.policy_version)

    @router.post("/syncline/adopt")
    async def adopt(body: AdoptBody) -> dict[str, Any]:
        _need_paused(served, "adopt")
        await served.remeasure()
        return await _name(served, body.policy_version)

    @router.post("/syncline/restart", status_code=HTTPStatus.ACCEPTED)
    async def restart(body: WeightsBody) -> dict[str, Any]:
        _need_paused(served, "restart")
        served.restart_from = body
        asyncio.get_running_loop().call_later(0.1, os.kill, os.getpid(), signal.SIGTERM)
        return served.receipt()

    return router


async def _fault(engine: Any) -> str | None:
    """What is wrong with the engine; a round trip to its core proves that it answers."""
    try:
        await asyncio.wait_for(engine.check_health(), HEALTH_TIMEOUT_SECONDS)
        await asyncio.wait_for(engine.is_paused(), HEALTH_TIMEOUT_SECONDS)
    except TimeoutError:
        return f"the engine core did not answer within {HEALTH_TIMEOUT_SECONDS:g} s"
    except Exception as error:  # the engine boundary: whatever vLLM raises here means it cannot sample
        return f"{type(error).__name__}: {error}"
    return None


async def _within(timeout_seconds: float, answer: Awaitable[None], what: str) -> None:
    try:
        await asyncio.wait_for(answer, timeout_seconds)
    except TimeoutError as error:
        raise EngineTimeout(f"the engine core did not {what} in {timeout_seconds:g} s") from error


def _need_paused(served: Served, action: str) -> None:
    if not served.gate.is_still:
        raise EngineError(f"{action} needs a paused engine, and requests may be sampling; pause it first")


async def _name(served: Served, policy_version: int) -> dict[str, Any]:
    served.refuse_backwards(policy_version)
    await compat.drop_caches(served.engine)
    await compat.name_weights(served.engine, policy_version)
    served.gate.name(policy_version, await compat.sampled_tokens(served.engine))
    served.torn = None
    return {**served.receipt(), "parameters": served.parameters}


async def _sample(served: Served, body: GenerateBody, visit: Visit, adapter: Adapter | None) -> dict[str, Any]:
    prompt = {"prompt_token_ids": list(body.prompt_token_ids)}
    lora_request = adapter.request() if adapter else None
    try:
        collector = await served.engine.add_request(visit.request_id, prompt, _params(body), lora_request=lora_request)
    except ValueError as error:
        raise EngineError(f"vLLM refused the request: {error}") from error
    await served.gate.submitted(visit)
    try:
        final = await collector.get()
    except asyncio.CancelledError:
        await served.engine.abort(visit.request_id)
        raise
    return {"completions": [_completion(output, visit) for output in final.outputs]}


def _params(body: GenerateBody) -> Any:
    from vllm import SamplingParams as VllmSamplingParams
    from vllm.sampling_params import RequestOutputKind

    asked = body.sampling
    return VllmSamplingParams(
        n=body.num_completions,
        max_tokens=asked.max_tokens,
        temperature=asked.temperature,
        top_p=asked.top_p,
        top_k=asked.top_k or -1,
        seed=asked.seed,
        stop_token_ids=list(asked.stop_token_ids) or None,
        logprobs=0,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def _completion(output: Any, visit: Visit) -> dict[str, Any]:
    token_ids = list(output.token_ids)
    return {
        "token_ids": token_ids,
        "logprobs": [row[token].logprob for token, row in zip(token_ids, output.logprobs, strict=True)],
        "versions": visit.spans(output.index, len(token_ids)),
        "finish_reason": output.finish_reason,
    }
