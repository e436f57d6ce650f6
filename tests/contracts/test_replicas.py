"""Several engines, one copy: a step is seen by every engine that samples from it, and each proves it."""

import asyncio
import os
import signal
from collections.abc import Iterator

import pytest
import torch
from outcomes import Noticed
from real_engine import make_tiny_model, run_values, starting_engine, wait_until_ready
from test_weight_bridge import DEVICE, DTYPE, TOLERANCE, Side
from transformers import AutoModelForCausalLM

from syncline.bridges.shared import SharedBridge
from syncline.config.schema import Bridge
from syncline.engines.pool import EnginePool
from syncline.errors import EngineError
from syncline.learner.model import checkpoint_shards
from syncline.types import SamplingParams

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600), pytest.mark.contract("shared, two engines", 1)]


@pytest.fixture(scope="module")
def sides(tmp_path_factory) -> Iterator[list[Side]]:
    folder = tmp_path_factory.mktemp("replicas")
    model = make_tiny_model(folder / "model")
    values = run_values(model, folder / "run", bridge={"name": "shared"})
    with starting_engine(values, folder / "a") as first:
        attach = ("--attach-to", first.url)  # type: ignore[attr-defined]
        with starting_engine(values, folder / "b", *attach) as second:
            wait_until_ready(first, second)
            yield [Side("shared", engine, model, folder) for engine in (first, second)]


def test_a_step_is_seen_and_proved_by_every_engine(sides: list[Side]) -> None:
    bridge = SharedBridge([s.engine for s in sides], Bridge(name="shared"), shards=checkpoint_shards)
    model = AutoModelForCausalLM.from_pretrained(sides[0].model_path, dtype=DTYPE).to(DEVICE)
    bridge.attach(model)
    bridge.publish(model, policy_version=0)
    for version in (1, 2):
        with bridge.updating():
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn_like(parameter) * 0.05)
            report = bridge.publish(model, policy_version=version)
        assert report.num_bytes == 0
        for side in sides:
            side.model = model
            assert side.engine.receipt() == report.receipt
            assert side.mismatch() < TOLERANCE
            assert {span.policy_version for c in side.sample() for span in c.versions} == {version}
    bridge.close()
    assert _sampled_by_both(sides)


def _sampled_by_both(sides: list[Side]) -> bool:
    async def sample() -> list:
        async with EnginePool([side.engine.url for side in sides], timeout_seconds=60) as pool:
            return await asyncio.gather(*(pool.generate((5, 6), SamplingParams(8)) for _ in range(6)))

    return all(completion.token_ids for [completion] in asyncio.run(sample()))


def test_an_engine_that_died_is_named_and_the_other_stays_paused(sides: list[Side], noticed: Noticed) -> None:
    first, second = sides
    bridge = SharedBridge([s.engine for s in sides], Bridge(name="shared"), shards=checkpoint_shards)
    bridge.attach(first.model)
    bridge.publish(first.model, policy_version=first.next_version())
    os.killpg(second.engine.process.pid, signal.SIGKILL)  # type: ignore[attr-defined]
    second.engine.process.wait(30)  # type: ignore[attr-defined]
    with pytest.raises(EngineError, match=second.engine.url) as told, bridge.updating():
        pass
    noticed("engine killed at an update", "shared", by="learner", told=told.value)
    assert first.engine._call("GET", "/health", None, 10)["paused"] is True
    bridge.close()


def test_an_owner_that_dies_while_its_memory_is_written_is_named_and_nothing_is_published(
    sides: list[Side], noticed: Noticed
) -> None:
    """The last of all: on a GPU the memory is gone with its owner, and whoever writes there may lose its own device."""
    owner = sides[0]
    bridge = SharedBridge([owner.engine], Bridge(name="shared"), shards=checkpoint_shards)
    bridge.attach(owner.model)
    bridge.publish(owner.model, policy_version=(version := owner.next_version()))
    lost = (EngineError, torch.AcceleratorError) if torch.cuda.is_available() else EngineError
    with pytest.raises(lost, match=owner.engine.url if lost is EngineError else None) as told, bridge.updating():
        os.killpg(owner.engine.process.pid, signal.SIGKILL)  # type: ignore[attr-defined]
        owner.engine.process.wait(30)  # type: ignore[attr-defined]
        with torch.no_grad():
            for parameter in owner.model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
        bridge.publish(owner.model, policy_version=version + 1)
    noticed("owner killed at an update", "shared", by="learner", told=told.value)
