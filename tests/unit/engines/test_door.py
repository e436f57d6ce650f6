"""What keeps one version's keys and values from the next: the salt of each request, and when the cache is dropped."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from syncline.engines.vllm import compat
from syncline.engines.vllm.door import engine_behind, salted
from syncline.engines.vllm.gate import Gate
from syncline.errors import ConfigError


@pytest.mark.parametrize(
    "prompt",
    ["text", [5, 6], {"prompt": "text"}, {"type": "token", "prompt_token_ids": [5, 6]}],
    ids=["text", "tokens", "a prompt", "rendered"],
)
def test_every_prompt_gets_the_salt(prompt: Any) -> None:
    kept = dict(prompt) if isinstance(prompt, dict) else None
    found = salted(prompt, "syncline-3")
    assert found["cache_salt"] == "syncline-3"
    assert {key for key in found if key != "cache_salt"} <= {"prompt", "prompt_token_ids", "type"}
    assert kept is None or prompt == kept, "the caller's prompt is left alone"


def test_a_salt_of_the_users_own_is_kept_beside_ours() -> None:
    one, other = (salted({"prompt": "text", "cache_salt": own}, "syncline-3")["cache_salt"] for own in ("a", "b"))
    assert one != other
    assert one.startswith("syncline-3")
    request = SimpleNamespace(cache_salt="a")
    assert salted(request, "syncline-4").cache_salt == "syncline-4:a"


def test_a_prompt_without_a_place_for_the_salt_is_refused() -> None:
    for prompt in ({"encoder_prompt": {}, "decoder_prompt": {}}, (piece for piece in "ab")):
        with pytest.raises(ValueError, match="cannot be kept apart"):
            salted(prompt, "syncline-3")


def test_requests_before_and_after_a_pause_have_other_salts() -> None:
    async def scenario() -> list[str]:
        gate, salts = Gate(policy_version=3), []
        for _ in range(2):
            async with gate.request("a") as visit:
                salts.append(visit.salt)
            async with gate.request("b") as visit:
                salts.append(visit.salt)
            gate.freeze(gate.close())
            gate.open(gate.num_pauses)
        return salts

    first, second, third, fourth = asyncio.run(scenario())
    assert first == second != third == fourth


def test_a_model_vllm_cannot_load_is_the_users_mistake(tmp_path: Any) -> None:
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = compat.server_parts().make_arg_parser(FlexibleArgumentParser())

    async def start() -> None:
        async with engine_behind(Gate(0), parser.parse_args(["--model", str(tmp_path)])):
            pass

    with pytest.raises(ConfigError, match=f"model.path: vLLM cannot serve '{tmp_path}' so: "):
        asyncio.run(start())


class Engine:
    """As much of vLLM's as a pause touches."""

    def __init__(self, *, num_unfinished: int = 0, kv_transfer: Any = None) -> None:
        self.output_processor = SimpleNamespace(has_unfinished_requests=lambda: num_unfinished > 0)
        self.model_config = SimpleNamespace(is_multimodal_model=False)
        self.vllm_config = SimpleNamespace(kv_transfer_config=kv_transfer)
        self.engine_core = self
        self.asked: dict[str, Any] = {}

    async def pause_scheduler_async(self, **asked: Any) -> None:
        self.asked = asked


@pytest.mark.parametrize("mode", ["drain", "abort", "keep"])
@pytest.mark.parametrize("reuse_kv", [False, True])
@pytest.mark.parametrize("num_unfinished", [0, 1])
def test_the_cache_is_dropped_for_frozen_requests_alone(mode: str, reuse_kv: bool, num_unfinished: int) -> None:
    engine = Engine(num_unfinished=num_unfinished)
    asyncio.run(compat.pause(engine, mode, reuse_kv=reuse_kv))
    frozen = mode == "keep" and num_unfinished > 0
    assert engine.asked == {"mode": "wait" if mode == "drain" else mode, "clear_cache": frozen and not reuse_kv}


def test_blocks_that_another_process_keeps_have_no_salt_and_are_always_dropped() -> None:
    engine = Engine(kv_transfer=object())
    asyncio.run(compat.pause(engine, "drain", reuse_kv=True))
    assert engine.asked["clear_cache"] is True
