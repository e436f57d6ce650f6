"""The engine as vLLM's own routes see it: whatever they sample passes the gate and gets the current adapter.

`/v1/completions`, `/v1/chat/completions` and the others know nothing of policy versions or pauses. They are handed this
in place of the engine, so that a pause holds for them too: a new request waits at the gate, one inside ends, freezes
or is aborted like our own. (`door.py` holds up whatever reaches the engine by another way.)
"""

from collections.abc import AsyncIterator
from typing import Any

from syncline.engines.vllm import compat
from syncline.engines.vllm.gate import UNPUBLISHED, Visit
from syncline.engines.vllm.served import Served


class GatedEngine:
    """vLLM's `EngineClient`; `generate` alone is not the engine's own."""

    def __init__(self, served: Served) -> None:
        self._served = served

    def __getattr__(self, name: str) -> Any:
        return getattr(self._served.engine, name)

    async def generate(self, prompt: Any, sampling_params: Any, request_id: str, **options: Any) -> AsyncIterator[Any]:
        async for output, _ in self.sample(prompt, sampling_params, request_id, **options):
            yield output

    async def sample(
        self, prompt: Any, sampling_params: Any, request_id: str, **options: Any
    ) -> AsyncIterator[tuple[Any, Visit]]:
        """The engine's outputs, each with the visit that knows the versions of its tokens."""
        served = self._served
        can_freeze = compat.can_freeze(seed=sampling_params.seed)
        async with served.gate.request(request_id, can_freeze=can_freeze) as visit:
            with served.adapters.running() as adapter:
                if adapter is not None and adapter is served.adapters.by_hand:
                    visit.entered_under = UNPUBLISHED
                if adapter is not None and options.get("lora_request") is None:
                    options["lora_request"] = adapter.request()
                entrance = _Entrance(served, visit)
                generate = type(served.engine).generate
                async for output in generate(entrance, prompt, sampling_params, request_id, **options):
                    yield output, visit


class _Entrance:
    """What `AsyncLLM.generate` runs on in place of the engine: it says when the engine has taken the request."""

    def __init__(self, served: Served, visit: Visit) -> None:
        self._served, self._visit = served, visit

    def __getattr__(self, name: str) -> Any:
        return getattr(self._served.engine, name)

    async def add_request(self, request_id: str, prompt: Any, params: Any, **options: Any) -> Any:
        """Under the visit's id, and past the gate, which the visit has passed."""
        del request_id
        collector = await self._served.engine.add_visit(self._visit, prompt, params, **options)
        await self._served.gate.submitted(self._visit)
        return collector
