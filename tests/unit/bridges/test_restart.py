"""What the `restart` bridge leaves on the disk."""

from pathlib import Path

import torch
from fake_engine import FakeEngine

from syncline.bridges.restart import RestartBridge
from syncline.config.schema import Bridge


class Weights(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.arange(4.0))


def bridge_to(engine: FakeEngine, folder: Path, assets: Path) -> RestartBridge:
    return RestartBridge(
        [engine],  # type: ignore[list-item]
        Bridge(),
        export=lambda model: model.named_parameters(),
        folder=folder,
        assets=assets,
    )


def test_what_a_killed_learner_half_wrote_is_gone_after_the_next_publish(tmp_path: Path) -> None:
    model, folder, assets = Weights(), tmp_path / "weights", tmp_path / "model"
    assets.mkdir()
    half_written = folder / "version-000021.partial"
    half_written.mkdir(parents=True)
    bridge = bridge_to(FakeEngine("engine 0", dict(model.named_parameters())), folder, assets)
    bridge.publish(model, policy_version=20)
    assert [path.name for path in folder.iterdir()] == ["version-000020"]


def test_the_last_two_versions_stay(tmp_path: Path) -> None:
    model, folder, assets = Weights(), tmp_path / "weights", tmp_path / "model"
    assets.mkdir()
    bridge = bridge_to(FakeEngine("engine 0", dict(model.named_parameters())), folder, assets)
    for version in range(4):
        model.weight.data.add_(1.0)
        bridge.publish(model, policy_version=version)
    assert sorted(path.name for path in folder.iterdir()) == ["version-000002", "version-000003"]
