"""Sampling, tokens in and tokens out, with the policy version of every token; and how the engine is.

`generate` passes the gate (`gate.py`), so it waits while weights move: for training not longer than `GATE_SECONDS`, as
the learner may have lost an engine that it told to pause, and then nobody opens the gate before the next publish.
"""

import asyncio
import base64
import binascii
import io
from collections.abc import Sequence
from contextlib import AsyncExitStack
from http import HTTPStatus
from typing import Any
from uuid import uuid4

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import Field

from syncline.engines.vllm import compat
from syncline.engines.vllm.adapters import Adapter
from syncline.engines.vllm.gate import UNPUBLISHED, Visit
from syncline.engines.vllm.routes import Body, Route
from syncline.engines.vllm.served import Served
from syncline.errors import EngineError
from syncline.types import SamplingParams

HEALTH_TIMEOUT_SECONDS = 5.0
GATE_SECONDS = 5.0


class GenerateBody(Body):
    prompt_token_ids: tuple[int, ...] = Field(min_length=1)
    sampling: SamplingParams
    num_completions: int = Field(default=1, ge=1)
    images: tuple[str, ...] = ()
    """Image files in base64; each has one placeholder among the tokens."""
    needs_version: bool = False
    """Answer 503, and sample nothing, while no published policy is held, or after `GATE_SECONDS` at the closed gate."""


def sampling_routes(served: Served) -> APIRouter:
    from vllm.entrypoints.serve.utils.api_utils import with_cancellation

    router = APIRouter(route_class=Route)

    @router.get("/health")
    async def health() -> JSONResponse:
        fault = await _fault(served.engine)
        body = {"status": fault or "ok", **served.about, **served.receipt(), "torn": served.torn}
        body["newest_version"] = served.gate.policy_version
        return JSONResponse(body, status_code=HTTPStatus.SERVICE_UNAVAILABLE if fault else HTTPStatus.OK)

    @router.post("/syncline/generate")
    @with_cancellation
    async def generate(body: GenerateBody, raw_request: Request) -> Response:
        del raw_request
        if body.needs_version and served.held.policy_version == UNPUBLISHED:
            fault = served.torn or "no policy version was published to this engine yet"
            return JSONResponse({"error": fault}, status_code=HTTPStatus.SERVICE_UNAVAILABLE)
        can_freeze = compat.can_freeze(seed=body.sampling.seed)
        async with AsyncExitStack() as inside:
            try:
                async with asyncio.timeout(GATE_SECONDS if body.needs_version else None):
                    asked = served.gate.request(f"syncline-{uuid4().hex}", can_freeze=can_freeze)
                    visit = await inside.enter_async_context(asked)
            except TimeoutError:
                told = {"error": f"the engine is paused, {GATE_SECONDS:g} s after the request came"}
                return JSONResponse(told, HTTPStatus.SERVICE_UNAVAILABLE, {"Retry-After": "0"})
            with served.adapters.running() as adapter:
                if adapter is not None and adapter is served.adapters.by_hand:
                    visit.entered_under = UNPUBLISHED
                return _json(await _sample(served, body, visit, adapter))

    return router


def _json(answer: dict[str, Any]) -> Response:
    """A step's completions all end at about the same time: Python's own encoder takes ten times as long."""
    import msgspec

    return Response(msgspec.json.encode(answer), media_type="application/json")


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


async def _sample(served: Served, body: GenerateBody, visit: Visit, adapter: Adapter | None) -> dict[str, Any]:
    prompt: dict[str, Any] = {"prompt_token_ids": list(body.prompt_token_ids)}
    lora_request = adapter.request() if adapter else None
    if body.images:
        prompt["multi_modal_data"] = {"image": await asyncio.to_thread(_pictures, body.images)}
    try:
        collector = await served.engine.add_visit(visit, prompt, _params(body), lora_request=lora_request)
    except ValueError as error:
        raise EngineError(f"vLLM refused the request: {error}") from error
    await served.gate.submitted(visit)
    try:
        final = await collector.get()
    except asyncio.CancelledError:
        await served.engine.abort(visit.request_id)
        raise
    read = {"prompt_token_ids": list(final.prompt_token_ids)} if body.images else {}
    return {"completions": [_completion(output, visit) for output in final.outputs], **read}


def _pictures(images: Sequence[str]) -> list[Any]:
    """Raises `EngineError` naming the one that is no image."""
    from PIL import Image

    pictures = []
    for i, image in enumerate(images):
        try:
            pictures.append(Image.open(io.BytesIO(base64.b64decode(image, validate=True))).convert("RGB"))
        except (binascii.Error, OSError) as error:
            raise EngineError(f"images.{i}: is no image file in base64 ({error})") from error
    return pictures


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
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def _completion(output: Any, visit: Visit) -> dict[str, Any]:
    """`output.logprobs` is flat: one a token, the sampled token's."""
    token_ids, logprobs = list(output.token_ids), output.logprobs
    if logprobs.token_ids != token_ids:
        raise EngineError("vLLM's logprobs are not those of the tokens it sampled")
    return {
        "token_ids": token_ids,
        "logprobs": logprobs.logprobs,
        "versions": visit.spans(output.index, len(token_ids)),
        "finish_reason": output.finish_reason,
    }
