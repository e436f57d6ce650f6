"""Slots: who runs under which adapter, and when one may be dropped for the next."""

import asyncio

import pytest

from syncline.engines.vllm.adapters import Adapter, Adapters
from syncline.errors import EngineError, EngineTimeout


def holding(num_adapters: int, *, num_slots: int = 2) -> Adapters:
    """The last one held is the policy."""
    adapters = Adapters(num_slots)
    for i in range(num_adapters):
        hold(adapters, f"policy-v{i}")
    adapters.policy = adapters.held[-1] if adapters.held else None
    return adapters


def hold(adapters: Adapters, name: str) -> Adapter:
    adapter = adapters.new(name)
    adapter.id = room(adapters)
    adapters.held.append(adapter)
    return adapter


def room(adapters: Adapters, timeout_seconds: float = 0.01) -> int:
    return asyncio.run(adapters.room(timeout_seconds=timeout_seconds))


def test_names_are_never_used_again() -> None:
    adapters = Adapters(2)
    one, two = adapters.new("policy-v3"), adapters.new("policy-v3")
    assert one.name != two.name
    assert one.path != two.path


def test_a_request_stays_under_the_adapter_it_began_with() -> None:
    adapters = holding(2)
    old, new = adapters.held
    adapters.policy = old
    with adapters.running() as mine:
        adapters.policy = new
        with adapters.running() as other:
            assert (mine, other) == (old, new)
            assert (old.num_running, new.num_running) == (1, 1)
    assert (old.num_running, new.num_running) == (0, 0)


def test_a_free_slot_needs_nothing_dropped() -> None:
    adapters = holding(1)
    [policy] = adapters.held
    assert room(adapters) != policy.id
    assert adapters.held == [policy]


def test_a_slot_whose_load_failed_is_free_again() -> None:
    adapters = holding(1)
    assert room(adapters) == room(adapters)


def test_the_idle_adapter_makes_room_and_the_policy_never_does() -> None:
    adapters = holding(2)
    old, policy = adapters.held
    assert room(adapters) == old.id
    assert adapters.held == [policy]


def test_room_waits_for_the_last_request_under_the_old_adapter() -> None:
    adapters = holding(2)
    old, policy = adapters.held
    adapters.policy = old

    async def scenario() -> None:
        with adapters.running():
            adapters.policy = policy
            waiting = asyncio.create_task(adapters.room(timeout_seconds=5))
            await asyncio.sleep(0)
            assert not waiting.done()
        assert await waiting == old.id

    asyncio.run(scenario())


def test_requests_that_do_not_end_are_named_at_the_deadline() -> None:
    adapters = holding(2)
    adapters.held[0].num_running = 3
    with pytest.raises(EngineTimeout, match=r"3 requests under policy-v0-\d+ still ran 0\.01 s"):
        room(adapters)


def test_an_adapter_loaded_by_hand_comes_before_the_policys_and_gives_it_back() -> None:
    adapters = holding(1)
    policy = adapters.policy
    adapters.by_hand = Adapter("mine", "/somewhere")
    assert adapters.current is adapters.by_hand
    adapters.by_hand = None
    assert adapters.current is policy


def test_an_engine_without_slots_says_what_to_set() -> None:
    with pytest.raises(EngineError, match=r"set model\.lora"):
        room(Adapters())
