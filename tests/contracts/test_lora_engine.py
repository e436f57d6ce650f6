"""What only the adapter's bridge can get wrong, on a real vLLM: transports, slots, caches, adapters loaded by hand."""

import asyncio
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from outcomes import Noticed
from real_engine import make_tiny_model, run_values, running_engine
from test_weight_bridge import DTYPE, LORA, TOLERANCE, Side, lora
from transformers import AutoModelForCausalLM

from syncline.bridges.adapter import AdapterLayout, LoraLayer
from syncline.bridges.carriers import Carrier
from syncline.config.schema import Bridge
from syncline.engines.client import EngineClient, EngineController
from syncline.errors import EngineError, SyncError
from syncline.protocols import Receipt
from syncline.types import Completion, SamplingParams

pytestmark = [pytest.mark.e2e, pytest.mark.contract("lora", 1)]
LONG_PROMPT = tuple(5 + i % 60 for i in range(200))
"""More than a block of vLLM's prefix cache, on a GPU and on a CPU."""


@pytest.fixture(scope="module")
def side(tmp_path_factory) -> Iterator[Side]:
    folder = tmp_path_factory.mktemp("adapters")
    model_path = make_tiny_model(folder / "model")
    values = run_values(model_path, folder / "run", bridge={"name": "lora"})
    values["model"] |= {"lora": LORA, "max_length": 320}
    with running_engine(values, folder) as engine:
        yield Side("lora", engine, model_path, folder / "adapters")


def attached(side: Side, engine: EngineController | None = None, **config: Any):
    """Also a fresh adapter: random steps add up, and with them what half precision rounds away."""
    side.reset()
    bridge = lora(side, Bridge(name="lora", **config))
    if engine is not None:
        bridge._fleet.engines = bridge._fleet.all = (engine,)  # type: ignore[attr-defined]
    bridge.attach(side.model)
    return bridge


def status(side: Side) -> dict[str, Any]:
    return httpx.get(f"{side.engine.url}/lora/status", timeout=30).json()  # type: ignore[attr-defined]


def post(side: Side, path: str, **body: Any) -> httpx.Response:
    return httpx.post(f"{side.engine.url}{path}", json=body, timeout=60)  # type: ignore[attr-defined]


def test_before_the_first_publish_the_base_alone_is_served(side: Side) -> None:
    assert status(side)["active_adapter_name"] is None
    assert side.mismatch() < TOLERANCE, "a fresh adapter adds nothing"


def test_files_reach_the_engine_too_and_are_an_adapter_peft_loads(side: Side) -> None:
    from peft import PeftModel

    bridge = attached(side, adapter_transfer="files")
    report = side.step(bridge, scale=0.05)
    assert report.receipt == side.engine.receipt()
    assert side.mismatch() < TOLERANCE
    base = AutoModelForCausalLM.from_pretrained(side.model_path, dtype=DTYPE)
    newest = max(side.folder.glob("adapter-*"))
    loaded = PeftModel.from_pretrained(base, newest).to(next(side.model.parameters()).device)
    [completion, *_] = side.sample()
    assert side.difference(tuple(range(5, 12)), completion, loaded) < TOLERANCE


def test_the_prefix_cache_never_serves_the_keys_of_another_version(side: Side) -> None:
    """Also for a version that is published again with other weights, by a learner that went back."""
    bridge = attached(side)
    seen = []
    for version in (side.next_version(), side.next_version(), side.next_version()):
        with torch.no_grad():
            for parameter in (p for p in side.model.parameters() if p.requires_grad):
                parameter.add_(torch.randn_like(parameter) * 0.05)
        bridge.publish(side.model, policy_version=version)
        assert side.mismatch(prompts=(LONG_PROMPT,) * 2) < TOLERANCE
        seen.append(side.sample(prompts=(LONG_PROMPT,))[0])
    stale = Side.difference(LONG_PROMPT, seen[0], side.model)
    assert stale > 2 * TOLERANCE, "the versions are too alike for this test to notice"


class Between:
    """The engine, with somebody between it and the bridge who exchanges two tensors of one shape."""

    def __init__(self, engine: EngineController, folder: Path) -> None:
        self._engine = engine
        self._folder = folder
        self.name = engine.name

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def stage(self, adapter: Mapping[str, Any], **options: Any) -> Mapping[str, str]:
        path = Path(adapter["source"]["folder"]) / "adapter_model.safetensors"
        from safetensors.torch import load_file, save_file

        tensors = load_file(path)
        one, two = (f"base_model.model.model.layers.{i}.mlp.up_proj.lora_B.weight" for i in (0, 1))
        tensors[one], tensors[two] = tensors[two].clone(), tensors[one].clone()
        save_file(tensors, path)
        return self._engine.stage(adapter, **options)


def test_a_wrong_adapter_is_never_sampled_from(side: Side) -> None:
    side.step(attached(side), scale=0.05)
    served = side.engine.receipt()
    tampered = attached(side, Between(side.engine, side.folder), adapter_transfer="files")  # type: ignore[arg-type]
    with pytest.raises(SyncError, match=r"(?s)loaded another adapter.*layers\.0\.mlp\.up_proj\.lora_B\.weight"):
        side.step(tampered, scale=0.05)
    assert httpx.get(f"{side.engine.url}/health", timeout=10).json()["paused"] is True  # type: ignore[attr-defined]
    assert side.engine.receipt() == served
    side.step(attached(side), scale=0.05)
    assert side.mismatch() < TOLERANCE


def test_an_adapter_of_other_modules_is_refused_by_the_engine(side: Side, tmp_path: Path, noticed: Noticed) -> None:
    layers = {"model.layers.0.mlp.gate": LoraLayer(torch.zeros(4, 128), torch.zeros(8, 4), 1.0)}
    layout = AdapterLayout.of(layers, str(DTYPE).removeprefix("torch."))
    carrier = Carrier(layout, ["memory"], device=torch.device("cpu"), folder=tmp_path)
    adapter = {"layout": layout.text, "source": carrier.send(0)[0]}
    with pytest.raises(EngineError, match=r"answered 409.*mlp\.gate: the engine cannot adapt this module") as told:
        side.engine.stage(adapter, policy_version=side.next_version(), timeout_seconds=30)
    noticed("wrong adapter", "lora", by="engine, before it loads", told=told.value)
    with pytest.raises(EngineError, match=r"answered 409.*no adapter here has digest"):
        side.engine.switch(Receipt(side.next_version(), "0" * 64))
    carrier.close()


def test_requests_of_the_version_before_the_last_are_waited_for_or_aborted(side: Side) -> None:
    """Two slots: the third version needs the first one's. A running request is never cut off by it, unless asked."""
    bridge, hasty = attached(side), attached(side, in_flight="abort")

    async def scenario() -> list[list[Completion]]:
        async with EngineClient(side.engine.url, timeout_seconds=120) as client:  # type: ignore[attr-defined]

            def start() -> asyncio.Task[list[Completion]]:
                return asyncio.create_task(client.generate((5, 6, 7), SamplingParams(100), num_completions=16))

            waited_for = start()
            await asyncio.sleep(0.1)
            for _ in range(2):
                await asyncio.to_thread(side.step, bridge, scale=0.05)
            aborted = start()
            await asyncio.sleep(0.1)
            await asyncio.to_thread(side.step, hasty, scale=0.05)
            return await asyncio.gather(waited_for, aborted)

    waited_for, aborted = asyncio.run(scenario())
    assert all(completion.finish_reason != "abort" for completion in waited_for)
    assert any(completion.finish_reason == "abort" for completion in aborted)
    assert {span.policy_version for c in aborted for span in c.versions} == {side.next_version() - 2}
    assert side.mismatch() < TOLERANCE


def test_an_adapter_loaded_by_hand_is_sampled_from_without_a_version(side: Side, tmp_path: Path) -> None:
    bridge = attached(side)
    side.step(bridge)
    policy = status(side)
    other = side.load(side.model_path)
    with torch.no_grad():
        for parameter in (p for p in other.parameters() if p.requires_grad):
            parameter.add_(torch.randn_like(parameter) * 0.05)
    other.save_pretrained(tmp_path / "mine")
    answer = post(side, "/lora/load", adapter_path=str(tmp_path / "mine")).json()
    assert answer["adapter_config"]["r"] == LORA["rank"]
    assert status(side)["active_adapter_path"] == str(tmp_path / "mine")
    assert side.engine.receipt().policy_version == -1
    sampled = side.sample()
    assert all(completion.versions == () for completion in sampled), "no learner may train on them"
    assert Side.difference(tuple(range(5, 12)), sampled[0], other) < TOLERANCE
    assert post(side, "/lora/unload").json()["previous_adapter"] == str(tmp_path / "mine")
    assert status(side)["digest"] == policy["digest"]
    assert side.mismatch() < TOLERANCE
    assert post(side, "/lora/load", adapter_path=str(tmp_path / "mine"), adapter_name="again").is_success
    side.model.load_state_dict(other.state_dict())
    bridge.publish(side.model, policy_version=policy["policy_version"] + 1)
    assert side.engine.receipt().policy_version == policy["policy_version"] + 1, "a publish takes over"
    assert all(completion.versions for completion in side.sample())


def test_a_folder_that_is_no_adapter_changes_nothing(side: Side, tmp_path: Path) -> None:
    before = status(side)
    assert post(side, "/lora/load", adapter_path=str(tmp_path / "nowhere")).status_code == 404
    (tmp_path / "adapter_config.json").write_text('{"r": 4, "lora_alpha": 4, "target_modules": ["q_proj"]}')
    assert post(side, "/lora/load", adapter_path=str(tmp_path)).status_code == 409
    assert status(side)["digest"] == before["digest"]
    assert side.mismatch() < TOLERANCE
