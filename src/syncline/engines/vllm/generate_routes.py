"""`/generate` as environments of other frameworks ask it: text or tokens in, tokens with their logprobs out.

Nobody configures which framework asks: the request tells. Atropos' server for vLLM takes `prompt`, sglang's takes
`sampling_params`, TRL's takes `prompts`. All pass the gate; the answers to the first two also carry the policy versions
of the tokens, which those clients ignore.
"""

import json
from collections.abc import AsyncIterator
from http import HTTPStatus
from typing import Any
from uuid import uuid4

from fastapi import APIRouter, HTTPException, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from syncline.engines.vllm.gated import GatedEngine
from syncline.engines.vllm.routes import Route
from syncline.engines.vllm.served import Served

LOWEST_LOGPROB = -1e9
"""In place of minus infinity, which JSON does not have."""


def generate_routes(served: Served) -> APIRouter:
    from vllm.entrypoints.serve.utils.api_utils import with_cancellation

    router, engine = APIRouter(route_class=Route), GatedEngine(served)

    @router.get("/health_generate")
    async def health_generate() -> Response:
        """Samples one token, through the gate."""
        await _final(engine, {"prompt_token_ids": [0]}, _params({"max_tokens": 1}))
        return Response(status_code=HTTPStatus.OK)

    @router.post("/generate")
    @router.post("/generate/")
    @with_cancellation
    async def generate(body: dict[str, Any], raw_request: Request) -> Response:
        del raw_request
        if "sampling_params" in body:
            return JSONResponse(await _as_sglang(engine, body))
        if "prompts" in body:
            return JSONResponse(await _as_trl(engine, body))
        return await _as_atropos(engine, body)

    return router


async def _as_atropos(engine: GatedEngine, body: dict[str, Any]) -> Response:
    """`prompt` is text or `{"prompt_token_ids": [...]}`; every other key is a sampling parameter of vLLM's."""
    asked = dict(body)
    prompt, stream = _prompt(asked.pop("prompt", None)), asked.pop("stream", False)
    params = _params(asked, stream=stream)
    if stream:
        return StreamingResponse(_lines(engine, prompt, params), media_type="application/x-ndjson")
    output, visit = await _final(engine, prompt, params)
    answer: dict[str, Any] = {
        "text": [completion.text for completion in output.outputs],
        "prompt": output.prompt,
        "finish_reasons": [completion.finish_reason for completion in output.outputs],
        "policy_versions": [visit.spans(c.index, len(c.token_ids)) for c in output.outputs],
    }
    if params.logprobs is not None:
        answer["logprobs"] = [[[_by_token(row)] for row in c.logprobs] for c in output.outputs]
        answer["prompt_token_ids"] = list(output.prompt_token_ids)
        answer["token_ids"] = [list(completion.token_ids) for completion in output.outputs]
    if params.prompt_logprobs is not None:
        answer["prompt_logprobs"] = [row and _by_token(row) for row in output.prompt_logprobs]
    return JSONResponse(answer)


async def _as_sglang(engine: GatedEngine, body: dict[str, Any]) -> Any:
    asked = dict(body["sampling_params"])
    if "max_new_tokens" in asked:
        asked["max_tokens"] = asked.pop("max_new_tokens")
    prompt = {"prompt_token_ids": body["input_ids"]} if "input_ids" in body else body.get("text")
    output, visit = await _final(engine, _prompt(prompt), _params({"logprobs": 0} | asked))
    answers = [
        {
            "text": c.text,
            "output_ids": list(c.token_ids),
            "meta_info": {
                "finish_reason": {"type": c.finish_reason},
                "prompt_tokens": len(output.prompt_token_ids),
                "completion_tokens": len(c.token_ids),
                "output_token_logprobs": [
                    [row[token].logprob, token, None] for token, row in zip(c.token_ids, c.logprobs, strict=True)
                ],
                "policy_versions": visit.spans(c.index, len(c.token_ids)),
            },
        }
        for c in output.outputs
    ]
    return answers if len(answers) > 1 else answers[0]


async def _as_trl(engine: GatedEngine, body: dict[str, Any]) -> dict[str, Any]:
    asked = {name: value for name, value in body.items() if name != "prompts"}
    params = _params({"logprobs": 0} | asked)
    found = [await _final(engine, _prompt(prompt), params) for prompt in body["prompts"]]
    completions = [completion for output, _ in found for completion in output.outputs]
    return {
        "prompt_ids": [list(output.prompt_token_ids) for output, _ in found],
        "completion_ids": [list(c.token_ids) for c in completions],
        "logprobs": [[row[t].logprob for t, row in zip(c.token_ids, c.logprobs, strict=True)] for c in completions],
    }


def _prompt(asked: Any) -> dict[str, Any]:
    """As the engine takes it. Raises 400."""
    if isinstance(asked, str) and asked:
        return {"prompt": asked}
    if isinstance(asked, dict) and asked.get("prompt_token_ids"):
        token_ids = asked["prompt_token_ids"]
        if all(isinstance(token, int) and token >= 0 for token in token_ids):
            return {"prompt_token_ids": token_ids}
    raise _bad("prompt must be a text or {'prompt_token_ids': [...]}, and not empty")


def _params(asked: dict[str, Any], *, stream: bool = False) -> Any:
    """vLLM's sampling parameters. Raises 400, naming what it does not know or take."""
    import msgspec
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    unknown = sorted(set(asked) - set(SamplingParams.__struct_fields__))
    if unknown:
        raise _bad(f"{', '.join(unknown)}: no sampling parameter of vLLM's")
    try:
        params = msgspec.convert(asked, SamplingParams, strict=False)
    except (msgspec.ValidationError, ValueError, TypeError) as error:
        raise _bad(str(error)) from error
    params.output_kind = RequestOutputKind.CUMULATIVE if stream else RequestOutputKind.FINAL_ONLY
    return params


async def _final(engine: GatedEngine, prompt: dict[str, Any], params: Any) -> tuple[Any, Any]:
    found = None
    try:
        async for last in engine.sample(prompt, params, f"generate-{uuid4().hex}"):
            found = last
    except ValueError as error:
        raise _bad(f"vLLM refused the request: {error}") from error
    if found is None:
        raise HTTPException(HTTPStatus.SERVICE_UNAVAILABLE, "the engine ended the request without an answer")
    return found


async def _lines(engine: GatedEngine, prompt: dict[str, Any], params: Any) -> AsyncIterator[bytes]:
    async for output, _ in engine.sample(prompt, params, f"generate-{uuid4().hex}"):
        texts = [(output.prompt or "") + completion.text for completion in output.outputs]
        yield (json.dumps({"text": texts}) + "\n").encode()


def _by_token(row: Any) -> dict[str, float]:
    """The sampled token first, as vLLM has it."""
    return {str(token): max(LOWEST_LOGPROB, entry.logprob) for token, entry in row.items()}


def _bad(message: str) -> HTTPException:
    return HTTPException(HTTPStatus.BAD_REQUEST, message)
