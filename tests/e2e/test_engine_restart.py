"""The `restart` bridge replacing the engine's process: same pid, new weights, proved, and requests that wait for it."""

import asyncio
from pathlib import Path

import pytest
import torch
from real_engine import make_tiny_model, run_values, running_engine
from transformers import AutoModelForCausalLM

from syncline.bridges.restart import RestartBridge
from syncline.config.schema import Bridge
from syncline.engines.client import EngineClient
from syncline.types import Completion, SamplingParams

pytestmark = pytest.mark.e2e
DTYPE = torch.bfloat16 if torch.cuda.is_available() else torch.float32


def test_the_engine_process_replaces_itself_and_requests_wait_for_it(tmp_path: Path) -> None:
    model_path = make_tiny_model(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=DTYPE)
    with running_engine(run_values(model_path, tmp_path / "run"), tmp_path) as engine:
        bridge = RestartBridge(
            [engine],
            Bridge(restart="process"),
            export=lambda m: m.named_parameters(),
            folder=tmp_path / "weights",
            assets=model_path,
        )
        bridge.publish(model, policy_version=0)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.1)

        async def publish_and_sample() -> list[Completion]:
            engine.pause(mode="drain", timeout_seconds=30)
            async with EngineClient(engine.url, timeout_seconds=180) as client:
                at_the_door = asyncio.create_task(client.generate((5, 6, 7), SamplingParams(8)))
                await asyncio.sleep(1)
                publishing = asyncio.create_task(asyncio.to_thread(bridge.publish, model, policy_version=1))
                await asyncio.sleep(2)  # long enough for the engine to be down; the request must wait, not fail
                sampled = await client.generate((5, 6, 7), SamplingParams(8)) + await at_the_door
            report = await publishing
            assert report.receipt == engine.receipt()
            return sampled

        for completion in asyncio.run(publish_and_sample()):
            assert [span.policy_version for span in completion.versions] == [1]
        assert engine.process.poll() is None, "the supervisor watches this pid"
