"""Engines that die under a `restart`: who goes on, who must stop, what one that comes back has to load."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_fleet_losses import MortalEngine

from syncline.bridges.restart import RestartBridge
from syncline.config.schema import Bridge
from syncline.errors import EngineGone, SyncError
from syncline.protocols import Receipt


class Weights(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.arange(4.0))

    def step(self) -> None:
        self.weight.data.add_(1.0)


class LoadingEngine(MortalEngine):
    """Calls `while_loading` before it answers that it has loaded."""

    while_loading: Callable[[], None] | None = None

    def reload(self, path: str, *, expected: Receipt, timeout_seconds: float) -> Receipt:
        held = super().reload(path, expected=expected, timeout_seconds=timeout_seconds)
        if self.while_loading:
            self.while_loading()
            return self.receipt()
        return held


def attached(tmp_path: Path, *, min_engines: int | None) -> tuple[Weights, list[LoadingEngine], RestartBridge]:
    model, assets = Weights(), tmp_path / "model"
    assets.mkdir()
    engines = [LoadingEngine(f"engine {name}", dict(model.named_parameters())) for name in "abc"]
    bridge = RestartBridge(
        engines,
        Bridge(min_engines=min_engines, timeout_seconds=3),
        export=lambda model: model.named_parameters(),
        folder=tmp_path / "weights",
        assets=assets,
    )
    bridge.attach(model)
    bridge.publish(model, policy_version=0)
    model.step()
    return model, engines, bridge


def assert_serves(engine: LoadingEngine, model: Weights, *, policy_version: int) -> None:
    assert engine.receipt().policy_version == policy_version
    assert torch.equal(engine.held("weight"), model.weight)
    assert engine.calls[-1] == "resume"


def test_a_dead_engine_is_left_out_and_loads_anew_when_it_is_back(tmp_path: Path) -> None:
    model, engines, bridge = attached(tmp_path, min_engines=2)
    engines[1].die()
    report = bridge.publish(model, policy_version=1)
    assert (report.num_engines, report.num_lost) == (2, 1)
    for engine in (engines[0], engines[2]):
        assert_serves(engine, model, policy_version=1)

    engines[1].come_back()
    report = bridge.publish(model, policy_version=2)
    assert (report.num_engines, report.num_lost) == (3, 0)
    for engine in engines:
        assert_serves(engine, model, policy_version=2)
    assert engines[1].calls == ["pause drain", "reload", "resume"], "unchanged weights were written for it again"
    bridge.close()


def test_one_that_dies_while_it_loads_does_not_take_the_others_with_it(tmp_path: Path) -> None:
    model, engines, bridge = attached(tmp_path, min_engines=1)

    def die() -> None:
        engines[2].die()
        raise EngineGone("engine c broke off /reload")

    engines[2].while_loading = die
    report = bridge.publish(model, policy_version=1)
    assert report.num_engines == 2
    for engine in engines[:2]:
        assert_serves(engine, model, policy_version=1)
    bridge.close()


def test_more_losses_than_allowed_stop_the_run_with_every_engine_paused(tmp_path: Path) -> None:
    model, engines, bridge = attached(tmp_path, min_engines=2)
    for engine in engines[1:]:
        engine.die()
    with pytest.raises(EngineGone, match="engine b broke off"):
        bridge.publish(model, policy_version=1)
    assert engines[0].calls[-1] == "pause abort"
    bridge.close()


def test_without_leave_the_first_loss_stops_the_run(tmp_path: Path) -> None:
    model, engines, bridge = attached(tmp_path, min_engines=None)
    engines[0].die()
    with pytest.raises(EngineGone, match="engine a broke off"):
        bridge.publish(model, policy_version=1)
    assert [engine.calls[-1] for engine in engines[1:]] == ["pause abort"] * 2
    bridge.close()


def test_wrong_weights_are_never_a_loss(tmp_path: Path) -> None:
    model, engines, bridge = attached(tmp_path, min_engines=1)
    engines[1].while_loading = lambda: engines[1].held("weight").add_(1)
    with pytest.raises(SyncError, match="engine b holds version 1 digest"):
        bridge.publish(model, policy_version=1)
    assert {engine.calls[-1] for engine in engines} == {"pause abort"}
    bridge.close()


def test_one_that_comes_back_as_another_model_stays_away(tmp_path: Path) -> None:
    model, engines, bridge = attached(tmp_path, min_engines=2)
    engines[1].die()
    bridge.publish(model, policy_version=1)
    engines[1].come_back()
    engines[1]._held = {"weight": torch.zeros(5)}
    report = bridge.publish(model, policy_version=2)
    assert (report.num_engines, report.num_lost) == (2, 1)
    assert "resume" not in engines[1].calls
    bridge.close()
