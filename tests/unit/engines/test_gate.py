"""The gate: one version a request, a close that waits, a deadline that says who did not leave."""

import asyncio

import pytest

from syncline.engines.vllm.gate import Gate
from syncline.errors import EngineTimeout


def test_a_request_runs_under_the_version_it_entered_with() -> None:
    async def scenario() -> None:
        gate = Gate(policy_version=3)
        async with gate.request() as version:
            assert version == 3
            await gate.close()
            with pytest.raises(EngineTimeout, match="1 requests were still running"):
                await gate.wait_until_empty(timeout_seconds=0.01)
        await gate.wait_until_empty(timeout_seconds=1)

    asyncio.run(scenario())


def test_requests_wait_at_a_closed_gate_and_get_the_new_version() -> None:
    async def scenario() -> None:
        gate = Gate(policy_version=0)
        await gate.close()
        entered: list[int] = []

        async def request() -> None:
            async with gate.request() as version:
                entered.append(version)

        waiting = [asyncio.create_task(request()) for _ in range(3)]
        await asyncio.sleep(0)
        assert entered == []
        gate.policy_version = 1
        await gate.open()
        await asyncio.wait_for(asyncio.gather(*waiting), 1)
        assert entered == [1, 1, 1]

    asyncio.run(scenario())


def test_a_cancelled_request_leaves_the_gate() -> None:
    async def scenario() -> None:
        gate = Gate(policy_version=0)
        inside = asyncio.Event()

        async def request() -> None:
            async with gate.request():
                inside.set()
                await asyncio.Event().wait()

        task = asyncio.create_task(request())
        await inside.wait()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await gate.close()
        await gate.wait_until_empty(timeout_seconds=1)

    asyncio.run(scenario())
