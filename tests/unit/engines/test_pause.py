"""What the pause of an engine that reads pictures forgets: all that weights made of them, and nothing else."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from syncline.engines.vllm import compat


class Core:
    """vLLM's engine core, as the pause sees it."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    async def pause_scheduler_async(self, *, mode: str, clear_cache: bool) -> None:
        self.calls.append((mode, clear_cache))

    async def reset_prefix_cache_async(self, *, reset_running_requests: bool, reset_connector: bool) -> bool:
        self.calls.append(("prefix", reset_running_requests, reset_connector))
        return True

    async def reset_encoder_cache_async(self) -> None:
        self.calls.append("encoder")


def paused(mode: str, *, running: bool = False, reuse_kv: bool = False) -> list[Any]:
    core = Core()
    engine = SimpleNamespace(
        engine_core=core,
        output_processor=SimpleNamespace(has_unfinished_requests=lambda: running),
        model_config=SimpleNamespace(is_multimodal_model=True),
        vllm_config=SimpleNamespace(kv_transfer_config=None),
    )
    asyncio.run(compat.pause(engine, mode, reuse_kv=reuse_kv))
    return core.calls


@pytest.mark.parametrize("mode", ["drain", "abort", "keep"])
def test_what_a_tower_made_of_pictures_goes_and_their_pixels_stay(mode: str) -> None:
    """`clear_cache` would drop the pixels too, on one side of vLLM's wire alone."""
    frozen = [("keep", False)] if mode == "abort" else []
    assert paused(mode) == [*frozen, ({"drain": "wait"}.get(mode, mode), False), "encoder"]


def test_an_abort_freezes_first_so_that_what_the_scheduler_holds_goes_out_before_it() -> None:
    assert [call[0] for call in paused("abort", running=True)[:2]] == ["keep", "abort"]


@pytest.mark.parametrize("reuse_kv", [False, True])
def test_a_frozen_request_may_be_half_way_through_a_picture_and_begins_anew(reuse_kv: bool) -> None:
    calls = paused("keep", running=True, reuse_kv=reuse_kv)
    assert calls == [("keep", False), ("prefix", True, True), "encoder"]
