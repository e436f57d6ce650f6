"""`restart` from two ranks: rank 0 writes the whole model and asks the engine; both prove, and both fail."""

from pathlib import Path
from typing import Any

import pytest
import torch
from rank_processes import on_ranks
from real_engine import make_tiny_model
from safetensors.torch import load_file

from syncline.bridges.ranks import Ranks
from syncline.bridges.receipt import kind_of, model_digest, parameter_digests
from syncline.bridges.restart import RestartBridge
from syncline.config.schema import Bridge, Model
from syncline.errors import TrainingError
from syncline.learner.model import checkpoint_shards, load_model
from syncline.learner.places import wholes
from syncline.protocols import Paused, Receipt


class FileEngine:
    """An `EngineControl` whose weights are the last checkpoint it was told to load."""

    name = "engine made of files"

    def __init__(self, parameters: dict[str, str]) -> None:
        self.held = Receipt(-1, "")
        self.calls: list[str] = []
        self._parameters = parameters

    def wait_until_ready(self, *, timeout_seconds: float) -> None: ...

    def pause(self, *, mode: str, timeout_seconds: float, reuse_kv: bool = False) -> Paused:
        self.calls.append("pause")
        return Paused(self.held)

    def resume(self, expected: Receipt) -> None:
        assert expected == self.held
        self.calls.append("resume")

    def receipt(self) -> Receipt:
        return self.held

    def parameters(self) -> dict[str, str]:
        return self._parameters

    def reload(self, path: str, *, expected: Receipt, timeout_seconds: float) -> Receipt:
        self.calls.append("reload")
        tensors = {k: t for file in Path(path).glob("*.safetensors") for k, t in load_file(file).items()}
        self.held = Receipt(expected.policy_version, model_digest(parameter_digests(tensors.items())))
        return self.held


def published(ranks: Ranks, path: str, folder: str) -> dict[str, Any]:
    model = load_model(Model(path=path, dtype="float32"), device=torch.device("cpu"), ranks=ranks)
    kinds = {name: kind_of(shard.tensor, shard.shape) for name, shard in checkpoint_shards(model)}
    engine = FileEngine(kinds)
    blocked = Path(folder) / "a file, no folder"

    def bridge(folder: Path) -> RestartBridge:
        return RestartBridge(
            [engine],  # type: ignore[list-item]
            Bridge(),
            export=lambda m: wholes(checkpoint_shards(m), ranks),
            folder=folder,
            assets=Path(path),
            ranks=ranks,
        )

    working = bridge(Path(folder) / "weights")
    working.attach(model)
    report = working.publish(model, policy_version=0)
    with pytest.raises(TrainingError) as failed:
        bridge(blocked / "weights").publish(perturbed(model), policy_version=1)
    return {"receipt": report.receipt, "calls": engine.calls, "failure": str(failed.value)}


def perturbed(model: torch.nn.Module) -> torch.nn.Module:
    for _, shard in checkpoint_shards(model):
        shard.tensor.data.add_(1.0)
    return model


def test_both_ranks_prove_the_whole_model_and_fail_together(tmp_path: Path) -> None:
    path = make_tiny_model(tmp_path / "model")
    (tmp_path / "a file, no folder").touch()
    first, second = on_ranks(published, str(path), str(tmp_path))
    whole = load_model(Model(path=str(path), dtype="float32"), device=torch.device("cpu"))
    expected = Receipt(0, model_digest(parameter_digests(whole.named_parameters())))
    assert first["receipt"] == second["receipt"] == expected
    assert first["calls"] == ["pause", "reload", "resume", "pause"], "the failed publish leaves the engine paused"
    assert second["calls"] == [], "only rank 0 speaks to the engine"
    assert "NotADirectoryError" in first["failure"]
    assert first["failure"] == second["failure"]
