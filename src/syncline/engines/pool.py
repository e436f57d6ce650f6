"""Several engines that sample the same policy, as one: each request goes to the engine with the fewest tokens to come.

What an engine still has to do is estimated from its running requests: their prompts, and for each completion the mean
length of those answered so far. A request that an engine did not answer (it is starting, has no published policy, or
died) goes to another: nothing of it was used. Such an engine rests for a moment before it is asked again. A paused one
keeps requests at its gate for some seconds, then sends them on; from then on one at a time asks whether it samples.
Where every engine rests, as in a long publish, the others wait at those gates too, spread by their tokens as ever.
"""

import asyncio
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager

from syncline.engines.client import RETRY_SECONDS, AtGate, EngineClient, NotReady
from syncline.errors import EngineError, EngineGone, EngineTimeout
from syncline.types import Completion, ImageRef, SamplingParams

REST_SECONDS = 1.0
GATE_REST_SECONDS = 5.0
"""Of a paused engine: about as long as it keeps the one that asks."""
_MEMORY = 0.02
"""Share of the newest completion in the mean length."""

log = logging.getLogger(__name__)


class EnginePool:
    """`Generate` over the engines at `urls`. Use as an async context manager; options are `EngineClient`'s.

    Without `unpublished_version`, engines that hold no published policy are passed over.
    """

    def __init__(self, urls: Sequence[str], *, timeout_seconds: float, unpublished_version: int | None = None) -> None:
        self._clients = [
            EngineClient(url, timeout_seconds=timeout_seconds, unpublished_version=unpublished_version) for url in urls
        ]
        self._needs_version = unpublished_version is None
        self._timeout_seconds = timeout_seconds
        self._tokens = dict.fromkeys(self._clients, 0.0)
        self._resting: dict[EngineClient, tuple[float, EngineError]] = {}
        """Until when, and what for."""
        self._mean_length: float | None = None
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
        """Raises `EngineTimeout` with what every engine said when none has answered in time."""
        deadline = time.monotonic() + self._timeout_seconds
        length = min(self._mean_length or sampling.max_tokens, sampling.max_tokens)
        said: dict[EngineClient, EngineError] = {}
        while True:
            if time.monotonic() > deadline:
                said = {client: fault for client, (_, fault) in self._resting.items()} | said
                faults = "\n".join(map(str, said.values()))
                raise EngineTimeout(f"no engine answered the request in {self._timeout_seconds:g} s:\n{faults}")
            client = self._next()
            if client is None:
                await asyncio.sleep(RETRY_SECONDS)
                continue
            try:
                with self._counted(client, len(prompt_token_ids) + num_completions * length):
                    found = await client.attempt(
                        prompt_token_ids,
                        sampling,
                        num_completions=num_completions,
                        images=images,
                        needs_version=self._needs_version,
                    )
            except (NotReady, EngineGone, EngineTimeout) as fault:
                if not isinstance(fault, NotReady) and len(self._clients) == 1:
                    raise
                self._rest(client, fault)
                said[client] = fault
                continue
            self._learn(client, found)
            return found

    def _next(self) -> EngineClient | None:
        now = time.monotonic()
        awake = [one for one in self._clients if one not in self._resting or self._resting[one][0] <= now]
        at_gate = [one for one, (_, fault) in self._resting.items() if isinstance(fault, AtGate)]
        chosen = min(awake or at_gate, key=lambda one: self._tokens[one], default=None)
        if chosen in at_gate:
            self._rest(chosen, self._resting[chosen][1])
        return chosen

    @contextmanager
    def _counted(self, client: EngineClient, num_tokens: float) -> Iterator[None]:
        self._tokens[client] += num_tokens
        try:
            yield
        finally:
            self._tokens[client] -= num_tokens

    def _rest(self, client: EngineClient, fault: EngineError) -> None:
        is_paused = isinstance(fault, AtGate)
        if client not in self._resting:
            level = logging.INFO if is_paused else logging.WARNING
            log.log(level, "%s; requests go elsewhere until it answers", fault)
        self._resting[client] = (time.monotonic() + (GATE_REST_SECONDS if is_paused else REST_SECONDS), fault)

    def _learn(self, client: EngineClient, found: Sequence[Completion]) -> None:
        if self._resting.pop(client, None):
            log.info("engine %s samples again", client.url)
        for length in (len(completion.token_ids) for completion in found):
            mean = self._mean_length
            self._mean_length = length if mean is None else mean + _MEMORY * (length - mean)
