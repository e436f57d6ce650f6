"""Several engines that sample the same policy, as one: each request goes to the engine with the fewest running."""

from collections.abc import Sequence
from contextlib import AsyncExitStack

from syncline.engines.client import EngineClient
from syncline.types import Completion, ImageRef, SamplingParams


class EnginePool:
    """`Generate` over the engines at `urls`. Use as an async context manager; options are `EngineClient`'s."""

    def __init__(self, urls: Sequence[str], *, timeout_seconds: float, unpublished_version: int | None = None) -> None:
        self._clients = [
            EngineClient(url, timeout_seconds=timeout_seconds, unpublished_version=unpublished_version) for url in urls
        ]
        self._running = dict.fromkeys(self._clients, 0)
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> "EnginePool":
        for client in self._clients:
            await self._stack.enter_async_context(client)
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._stack.aclose()

    async def generate(
        self,
        prompt_token_ids: Sequence[int],
        sampling: SamplingParams,
        *,
        num_completions: int = 1,
        images: Sequence[ImageRef] = (),
    ) -> list[Completion]:
        client = min(self._clients, key=lambda one: self._running[one])
        self._running[client] += num_completions
        try:
            return await client.generate(prompt_token_ids, sampling, num_completions=num_completions, images=images)
        finally:
            self._running[client] -= num_completions
