"""The pool: requests go where the fewest completions are being sampled."""

import asyncio

from syncline.engines.pool import EnginePool
from syncline.types import Completion, SamplingParams


class Engine:
    """Answers when told to."""

    def __init__(self) -> None:
        self.prompts: list[int] = []
        self.answer = asyncio.Event()

    async def generate(self, prompt_token_ids, sampling, *, num_completions=1, images=()) -> list[Completion]:
        self.prompts.append(prompt_token_ids[0])
        await self.answer.wait()
        return []


def test_each_request_goes_to_the_engine_with_the_fewest_completions() -> None:
    async def scenario() -> tuple[list[int], list[int]]:
        pool = EnginePool(["http://a", "http://b"], timeout_seconds=1)
        first, second = Engine(), Engine()
        pool._running = {first: 0, second: 0}  # type: ignore[dict-item]
        pool._clients = [first, second]  # type: ignore[list-item]
        sampling = SamplingParams(4)

        async def ask(prompt: int, num_completions: int) -> None:
            await pool.generate((prompt,), sampling, num_completions=num_completions)

        running = []
        for prompt, num_completions in ((1, 4), (2, 1), (3, 1), (4, 1)):
            running.append(asyncio.create_task(ask(prompt, num_completions)))
            await asyncio.sleep(0)
        first.answer.set()
        await running[0]
        running.append(asyncio.create_task(ask(5, 1)))
        await asyncio.sleep(0)
        second.answer.set()
        await asyncio.gather(*running)
        return first.prompts, second.prompts

    assert asyncio.run(scenario()) == ([1, 5], [2, 3, 4])
