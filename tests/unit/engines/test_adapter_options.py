"""When the engine is started with slots for adapters, and of which rank."""

import pytest

from syncline.config import RunConfig, resolve
from syncline.engines.vllm.arguments import Start, _options


def options(bridge: str, rank: int | None) -> dict[str, str]:
    values = {
        "run": {"dir": "x", "num_steps": 1, "groups_per_step": 1},
        "model": {"path": "m", "max_length": 64, "lora": {"rank": rank} if rank else None},
        "sampling": {"max_tokens": 8},
        "environments": [{"task": "arithmetic"}],
        "bridge": {"name": bridge},
    }
    config: RunConfig = resolve(values)
    words = _options(config, "cpu", Start(port=1))
    return {word.removeprefix("--"): value for word, value in zip(words, [*words[1:], ""], strict=True)}


@pytest.mark.parametrize(("rank", "slot"), [(1, "1"), (4, "8"), (32, "32"), (33, "64"), (300, "320")])
@pytest.mark.parametrize("bridge", ["lora", "shared"])
def test_slots_have_the_next_rank_vllm_knows(bridge: str, rank: int, slot: str) -> None:
    found = options(bridge, rank)
    assert "enable-lora" in found
    assert (found["max-lora-rank"], found["max-loras"]) == (slot, "2")


def test_merged_or_absent_adapters_need_no_slots() -> None:
    assert not any("lora" in word for word in options("restart", 8))
    assert not any("lora" in word for word in options("shared", None))
