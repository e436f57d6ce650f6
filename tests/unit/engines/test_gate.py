"""The gate: the version of every token, closes that wait, deadlines that say who did not leave."""

import asyncio

import pytest

from syncline.engines.vllm.gate import Gate, Visit
from syncline.errors import EngineGone, EngineTimeout


def test_a_request_that_ends_before_the_next_version_is_of_one() -> None:
    async def scenario() -> None:
        gate = Gate(policy_version=3)
        async with gate.request("a") as visit:
            gate.close()
            with pytest.raises(EngineTimeout, match="1 requests were still running"):
                await gate.wait_until_empty(timeout_seconds=0.01)
            assert visit.spans(0, 5) == [(3, 0, 5)]
        await gate.wait_until_empty(timeout_seconds=1)

    asyncio.run(scenario())


def test_a_request_kept_over_two_versions_has_the_tokens_of_each() -> None:
    """Three completions: 0 goes on through both changes, 1 ended before the first, 2 had sampled nothing by it."""

    async def scenario() -> Visit:
        gate = Gate(policy_version=3)
        async with gate.request("a") as visit:
            gate.name(4, {"a": {0: 2, 2: 0}, "b": {0: 9}})
            gate.name(5, {"a": {0: 6, 2: 1}})
        return visit

    visit = asyncio.run(scenario())
    assert visit.spans(0, 7) == [(3, 0, 2), (4, 2, 6), (5, 6, 7)]
    assert visit.spans(1, 4) == [(3, 0, 4)]
    assert visit.spans(2, 3) == [(4, 0, 1), (5, 1, 3)]
    assert visit.spans(1, 0) == []


def test_tokens_from_before_the_first_publish_make_a_completion_of_no_version() -> None:
    visit = Visit("a", -1, changes=[(0, {0: 2})])
    assert visit.spans(0, 5) == []
    assert Visit("a", -1, changes=[(0, {0: 0})]).spans(0, 5) == [(0, 0, 5)]


def test_requests_wait_at_a_closed_gate_and_get_the_new_version() -> None:
    async def scenario() -> None:
        gate = Gate(policy_version=0)
        pause = gate.close()
        entered: list[int] = []

        async def request(request_id: str) -> None:
            async with gate.request(request_id) as visit:
                entered.append(visit.entered_under)

        waiting = [asyncio.create_task(request(str(i))) for i in range(3)]
        await asyncio.sleep(0)
        assert entered == []
        gate.freeze(pause)
        gate.name(1, {})
        gate.open(pause)
        await asyncio.wait_for(asyncio.gather(*waiting), 1)
        assert entered == [1, 1, 1]
        assert not gate.is_still

    asyncio.run(scenario())


def test_a_close_can_wait_until_the_engine_has_every_request() -> None:
    async def scenario() -> None:
        gate = Gate(policy_version=0)
        async with gate.request("a") as visit:
            gate.close()
            with pytest.raises(EngineTimeout, match="1 requests had not all reached the engine"):
                await gate.wait_until_submitted(timeout_seconds=0.01)
            await gate.submitted(visit)
            await gate.wait_until_submitted(timeout_seconds=1)

    asyncio.run(scenario())


def test_a_cancelled_request_leaves_the_gate() -> None:
    async def scenario() -> None:
        gate = Gate(policy_version=0)
        inside = asyncio.Event()

        async def request() -> None:
            async with gate.request("a"):
                inside.set()
                await asyncio.Event().wait()

        task = asyncio.create_task(request())
        await inside.wait()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        gate.close()
        await gate.wait_until_empty(timeout_seconds=1)

    asyncio.run(scenario())


@pytest.mark.parametrize("turns", range(4))
@pytest.mark.parametrize("after", range(4))
def test_a_request_whose_client_goes_as_it_leaves_holds_up_no_pause(turns: int, after: int) -> None:
    """The pause begins `turns` turns of the event loop before the request ends, its client goes `after` turns later."""

    async def scenario() -> None:
        gate, ended = Gate(policy_version=0), asyncio.Event()

        async def request() -> None:
            async with gate.request("a"):
                await ended.wait()

        async def pause() -> None:
            gate.close()
            await gate.wait_until_empty(timeout_seconds=1)

        leaving = asyncio.create_task(request())
        await asyncio.sleep(0)
        pausing = asyncio.create_task(pause())
        for _ in range(turns):
            await asyncio.sleep(0)
        ended.set()
        for _ in range(after):
            await asyncio.sleep(0)
        leaving.cancel()
        await asyncio.gather(leaving, return_exceptions=True)
        for _ in range(10):
            await asyncio.sleep(0)
        assert (gate.num_inside, pausing.done()) == (0, True), "it saw the last one leave"
        await pausing

    asyncio.run(scenario())


def test_a_pause_that_keeps_requests_waits_for_one_that_cannot_be_frozen() -> None:
    async def scenario() -> None:
        gate = Gate(policy_version=0)
        async with gate.request("a") as kept:
            await gate.submitted(kept)
            async with gate.request("b", can_freeze=False) as ending:
                await gate.submitted(ending)
                with pytest.raises(EngineTimeout, match="cannot be frozen"):
                    await gate.wait_until_freezable(timeout_seconds=0.01)
            await gate.wait_until_freezable(timeout_seconds=1)

    asyncio.run(scenario())


def test_requests_at_the_door_of_an_engine_that_ends_are_sent_away() -> None:
    async def enter(gate: Gate) -> None:
        async with gate.request("a"):
            pass

    async def scenario() -> None:
        gate = Gate(policy_version=3)
        gate.close()
        waiting = asyncio.create_task(enter(gate))
        await asyncio.sleep(0)
        gate.shut()
        for late in (waiting, enter(gate)):
            with pytest.raises(EngineGone, match="ending, or starting anew"):
                await asyncio.wait_for(late, 1)

    asyncio.run(scenario())
