"""An adapter on a real vLLM of two ranks: one of them goes wrong, and adapters that come as files."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from real_engine import make_tiny_model, run_values, running_engine
from spoilt_worker import SPOIL, install
from test_lora_engine import attached, post, status
from test_weight_bridge import DEVICE, LORA, TOLERANCE, Side

from syncline.errors import EngineError, SyncError

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.contract("lora", 2),
    pytest.mark.skipif(torch.cuda.device_count() == 1, reason="needs 2 GPUs"),
]


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory) -> Path:
    """Written to, it spoils the slot of rank 1."""
    return tmp_path_factory.mktemp("spoilt") / "asked"


@pytest.fixture(scope="module")
def side(tmp_path_factory, spoilt: Path) -> Iterator[Side]:
    folder = tmp_path_factory.mktemp("adapter-ranks")
    model_path = make_tiny_model(folder / "model")
    values = run_values(model_path, folder / "run", bridge={"name": "lora"})
    values["model"] |= {"lora": LORA}
    values["engine"] |= {"device": DEVICE, "devices": [0, 1], "tensor_parallel_size": 2}
    values["learner"] = {"device": DEVICE}
    install(folder / "plugins")
    environment = {SPOIL: str(spoilt), "PYTHONPATH": os.pathsep.join([str(folder / "plugins"), *sys.path])}
    with running_engine(values, folder, environment=environment) as engine:
        yield Side("lora", engine, model_path, folder / "adapters")


NAMED = {
    "part": r"(?s)loaded another adapter.*layers\.1\.mlp\.gate_proj\.lora_B\.weight: the learner",
    "copy": r"layers\.1\.mlp\.gate_proj\.lora_A\.weight: ranks 0 and 1 hold different copies",
    "padding": r"rank 1: model\.layers\.1\.mlp\.down_proj: the engine's slot holds more",
}


@pytest.mark.parametrize("fault", NAMED)
def test_one_ranks_slot_is_spoilt(side: Side, spoilt: Path, fault: str) -> None:
    """More often than there are slots: what one rank could not prove no rank keeps."""
    bridge = attached(side)
    side.step(bridge, scale=0.05)
    served = side.engine.receipt()
    spoilt.write_text(fault)
    for _ in range(3):
        with pytest.raises((SyncError, EngineError), match=NAMED[fault]):
            side.step(bridge, scale=0.05)
        assert side.engine.receipt() == served
    assert side.engine.health()["paused"] is True
    spoilt.unlink()
    side.step(bridge, scale=0.05)
    assert side.mismatch() < TOLERANCE


def test_a_slot_that_is_spoilt_under_a_paused_engine_is_not_sampled_from(side: Side, spoilt: Path) -> None:
    bridge = attached(side)
    side.step(bridge, scale=0.05)
    side.engine.pause(mode="abort", timeout_seconds=30)
    spoilt.write_text("part")
    with pytest.raises(EngineError, match=r"answered 409.*publish a new version instead"):
        side.resume()
    spoilt.unlink()
    side.step(bridge, scale=0.05)
    assert side.mismatch() < TOLERANCE


def test_files_reach_every_rank(side: Side) -> None:
    report = side.step(attached(side, adapter_transfer="files"), scale=0.05)
    assert report.receipt == side.engine.receipt()
    assert side.mismatch() < TOLERANCE


def test_an_adapter_loaded_by_hand_is_sampled_from_on_every_rank(side: Side, tmp_path: Path) -> None:
    side.step(attached(side))
    policy = status(side)
    other = side.load(side.model_path)
    with torch.no_grad():
        for parameter in (p for p in other.parameters() if p.requires_grad):
            parameter.add_(torch.randn_like(parameter) * 0.05)
    other.save_pretrained(tmp_path / "mine")
    assert post(side, "/lora/load", adapter_path=str(tmp_path / "mine")).is_success
    assert side.engine.receipt().policy_version == -1
    assert Side.difference(tuple(range(5, 12)), side.sample()[0], other) < TOLERANCE
    assert post(side, "/lora/unload").is_success
    assert status(side)["digest"] == policy["digest"]
