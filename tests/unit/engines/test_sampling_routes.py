"""What `/syncline/generate` asks of vLLM and answers, with vLLM's own outputs and no engine."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import APIRouter, FastAPI
from vllm.logprobs import create_sample_logprobs
from vllm.v1.engine.exceptions import EngineDeadError

from syncline.engines.vllm import sampling_routes as sampling_module
from syncline.engines.vllm.gate import Gate, Visit
from syncline.engines.vllm.generate_routes import generate_routes
from syncline.engines.vllm.sampling_routes import sampling_routes
from syncline.engines.vllm.served import Served


class Engine:
    """Samples what it is told to."""

    def __init__(self, sampled: list[int], recorded: list[int]) -> None:
        self._sampled, self._recorded = sampled, recorded
        self.params: Any = None

    async def add_visit(self, visit: Any, prompt: Any, params: Any, *, lora_request: Any) -> Any:
        assert lora_request is None
        self.params = params
        logprobs: Any = create_sample_logprobs(params.flat_logprobs)
        for token in self._recorded:
            logprobs.append_fast([token], [-token / 8], iter([1]), iter([None]))
        completion = SimpleNamespace(index=0, token_ids=self._sampled, logprobs=logprobs, finish_reason="length")
        answer = SimpleNamespace(prompt_token_ids=prompt["prompt_token_ids"], outputs=[completion])
        return SimpleNamespace(get=lambda: asyncio.sleep(0, answer))


BODY = {"prompt_token_ids": [5, 6], "sampling": {"max_tokens": 3, "temperature": 0.5}}


def asked(
    engine: Engine,
    routes: Callable[[Served], APIRouter] = sampling_routes,
    *,
    path: str = "/syncline/generate",
    body: dict[str, Any] = BODY,
    gate: Gate | None = None,
) -> httpx.Response:
    app = FastAPI()
    app.include_router(routes(Served(engine, gate or Gate(3), {})))

    async def ask() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://engine") as client:
            return await client.post(path, json=body)

    return asyncio.run(ask())


def test_the_answer_is_the_sampled_tokens_with_their_logprobs_and_versions() -> None:
    engine = Engine([7, 9, 11], [7, 9, 11])
    answer = asked(engine)
    assert (answer.status_code, answer.headers["content-type"]) == (200, "application/json")
    assert answer.json() == {
        "completions": [
            {
                "token_ids": [7, 9, 11],
                "logprobs": [-0.875, -1.125, -1.375],
                "versions": [[3, 0, 3]],
                "finish_reason": "length",
            }
        ]
    }
    assert (engine.params.logprobs, engine.params.detokenize, engine.params.temperature) == (0, False, 0.5)


class Late(Gate):
    """Opens after some turns of the loop."""

    @asynccontextmanager
    async def request(self, request_id: str, *, can_freeze: bool = True) -> AsyncIterator[Visit]:
        for _ in range(9):
            await asyncio.sleep(0)
        async with super().request(request_id, can_freeze=can_freeze) as visit:
            yield visit


def test_only_a_request_for_training_is_sent_on_from_the_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may go to another engine; the learner may have lost this one, and then nobody opens the gate."""
    monkeypatch.setattr(sampling_module, "GATE_SECONDS", 0.0)
    gate, engine = Late(3), Engine([7], [7])
    sent_on = asked(engine, body=BODY | {"needs_version": True}, gate=gate)
    assert (sent_on.status_code, sent_on.headers["retry-after"]) == (503, "0")
    assert "the engine is paused" in sent_on.json()["error"]
    assert (gate.num_inside, engine.params) == (0, None)
    assert asked(engine, gate=gate).status_code == 200


class Dead(Engine):
    """Its core died: `submitted` requests are told so, later ones are not taken."""

    def __init__(self, *, submitted: bool) -> None:
        super().__init__([7], [7])
        self._submitted = submitted

    async def add_visit(self, *args: Any, **kwargs: Any) -> Any:
        if self._submitted:
            return SimpleNamespace(get=self._died)
        return await self._died()

    async def generate(self, *args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        yield await self._died()

    async def _died(self) -> Any:
        raise EngineDeadError


@pytest.mark.parametrize("submitted", [True, False])
def test_requests_of_an_engine_whose_core_died_are_sent_elsewhere(submitted: bool) -> None:
    answer = asked(Dead(submitted=submitted))
    assert answer.status_code == 503, "nothing was sampled, so a pool asks another engine"
    assert answer.json()["error"].startswith("the engine core died: EngineCore encountered an issue")


def test_other_frameworks_are_told_of_a_core_that_died_too() -> None:
    answer = asked(Dead(submitted=False), generate_routes, path="/generate", body={"prompt": "2+2="})
    assert answer.status_code == 503


def test_requests_that_an_ending_server_waits_for_no_longer_are_sent_elsewhere() -> None:
    class Hung(Dead):
        async def _died(self) -> Any:
            asyncio.current_task().cancel()  # type: ignore[union-attr]
            await asyncio.Event().wait()

    answer = asked(Hung(submitted=False), generate_routes, path="/generate", body={"prompt": "2+2="})
    assert (answer.status_code, answer.json()["error"]) == (503, "the engine is ending, or starting anew")


@pytest.mark.parametrize("recorded", [[7, 9], [7, 11, 9]], ids=["one is missing", "of other tokens"])
def test_logprobs_of_other_tokens_are_not_passed_on(recorded: list[int]) -> None:
    answer = asked(Engine([7, 9, 11], recorded))
    assert answer.status_code == 409
    assert "not those of the tokens" in answer.json()["error"]
