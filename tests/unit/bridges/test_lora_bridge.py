"""The adapter reaches every engine or none, and whoever is at fault is named."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from syncline.bridges.adapter import AdapterLayout, LoraLayer
from syncline.bridges.carriers import Receiver, whereabouts
from syncline.bridges.lora import LoraBridge
from syncline.bridges.receipt import model_digest, parameter_digests
from syncline.config.schema import Bridge
from syncline.errors import EngineError, EngineGone, EngineTimeout, SyncError
from syncline.protocols import Paused, Receipt

CPU = torch.device("cpu")


class Model(nn.Module):
    """One frozen layer and its adapter, as `base` and `layers` below see them."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.arange(12.0).view(4, 3), requires_grad=False)
        self.layers = {"w": LoraLayer(torch.ones(2, 3), torch.zeros(4, 2), 1.5)}


class FakeEngine:
    """`EngineControl` in memory: holds what it reads, and switches as a real one does."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.base = parameter_digests([("w.weight", torch.arange(12.0).view(4, 3))])
        self.modules = {"w": [3, 4]}
        self.num_ranks = 1
        self.held: list[dict[str, str]] = [{}]
        self.serves, self.version, self.paused = self.held[0], -1, False
        self.calls: list[str] = []
        self.fault: str | None = None
        """The call that fails."""
        self.kind: type[EngineError] = EngineError
        self.is_back = True
        self.tampers = False

    def _called(self, call: str) -> None:
        self.calls.append(call)
        if self.fault == call:
            raise self.kind(f"{self.name} failed to {call}")

    def wait_until_ready(self, *, timeout_seconds: float) -> None:
        if not self.is_back:
            raise EngineTimeout(f"{self.name} was not ready")

    def pause(self, *, mode: str, timeout_seconds: float, reuse_kv: bool = False) -> Paused:
        self._called(f"pause {mode}")
        self.paused = True
        return Paused(self.receipt())

    def resume(self, expected: Receipt) -> None:
        self._called("resume")
        assert expected == self.receipt()
        self.paused = False

    def receipt(self) -> Receipt:
        return Receipt(self.version, model_digest(self.base | self.serves))

    def parameters(self) -> Mapping[str, str]:
        return self.base | self.serves

    def adapters(self) -> Mapping[str, Any]:
        about = {"dtype": "float32", "max_rank": 8, "modules": self.modules}
        return about | {"whereabouts": [whereabouts(CPU)]}

    def export(self) -> list[Mapping[str, Any]]:
        return [{}] * self.num_ranks

    def stage(self, adapter: Mapping[str, Any], *, policy_version: int, timeout_seconds: float) -> Mapping[str, str]:
        self._called("stage")
        layout = AdapterLayout.from_text(adapter["layout"])
        buffer, sent = layout.new_buffer(CPU), Receiver(CPU).receive(adapter["source"], layout)
        for name, view in layout.views(buffer).items():
            view.copy_(sent[name])
        if self.tampers:
            layout.views(buffer)["w.lora_B.weight"].add_(1)
        self.held.append(layout.on(buffer).digests())
        return self.held[-1]

    def switch(self, receipt: Receipt, *, resume: bool = False) -> Receipt:
        self._called("switch")
        self.paused = self.paused and not resume
        self.serves = next(held for held in self.held if model_digest(self.base | held) == receipt.digest)
        self.version = receipt.policy_version
        return self.receipt()


@pytest.fixture
def engines() -> list[FakeEngine]:
    return [FakeEngine("first"), FakeEngine("second")]


def attached(
    engines: list[FakeEngine], folder: Path, *, shares_base: bool = False, **config: Any
) -> tuple[LoraBridge, Model]:
    model = Model()
    bridge = LoraBridge(
        engines,  # type: ignore[arg-type]
        Bridge(name="lora", **config),
        base=lambda m: [("w.weight", m.w)],
        layers=lambda m: m.layers.items(),
        folder=folder,
        shares_base=shares_base,
    )
    bridge.attach(model)
    return bridge, model


def test_every_engine_serves_the_proved_adapter_and_none_was_paused(engines: list[FakeEngine], tmp_path: Path) -> None:
    bridge, model = attached(engines, tmp_path)
    for version in (0, 1):
        model.layers["w"].b.add_(0.5)
        with bridge.updating():
            report = bridge.publish(model, policy_version=version)
        assert [engine.receipt() for engine in engines] == [report.receipt] * 2
        assert (report.receipt.policy_version, report.num_bytes, report.pause_seconds) == (version, 14 * 4, 0.0)
    assert all("pause" not in call for engine in engines for call in engine.calls)


def test_an_unchanged_adapter_is_not_sent_again(engines: list[FakeEngine], tmp_path: Path) -> None:
    bridge, model = attached(engines, tmp_path)
    bridge.publish(model, policy_version=0)
    report = bridge.publish(model, policy_version=1)
    assert report.num_bytes == 0
    assert [engine.calls.count("stage") for engine in engines] == [1, 1]
    assert [engine.version for engine in engines] == [1, 1]


def test_engines_are_asked_what_they_serve_where_the_last_publish_does_not_tell(
    engines: list[FakeEngine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bridge, model = attached(engines, tmp_path)
    asked: list[int] = []
    monkeypatch.setattr(bridge._fleet, "receipts", lambda: asked.append(1) or [e.receipt() for e in engines])

    def publish(version: int, *, changed: bool = True) -> int:
        asked.clear()
        model.layers["w"].b.add_(float(changed))
        bridge.publish(model, policy_version=version)
        return len(asked)

    assert [publish(5), publish(6), publish(7, changed=False), publish(8)] == [1, 0, 1, 0]
    with pytest.raises(SyncError, match="policy_version 3 is older than 8, which engine first already serves"):
        publish(3)
    assert publish(9) == 1, "whatever the failed one left behind"


def test_an_engine_that_started_again_gets_the_adapter_again(engines: list[FakeEngine], tmp_path: Path) -> None:
    bridge, model = attached(engines, tmp_path)
    bridge.publish(model, policy_version=0)
    engines[1].__init__("second")
    bridge.publish(model, policy_version=1)
    assert engines[0].receipt() == engines[1].receipt()


@pytest.mark.parametrize("tampers", [False, True], ids=["fails", "holds another"])
def test_when_one_engine_cannot_load_none_switches(engines: list[FakeEngine], tmp_path: Path, tampers: bool) -> None:
    bridge, model = attached(engines, tmp_path)
    served = bridge.publish(model, policy_version=0).receipt
    model.layers["w"].b.add_(1)
    engines[1].fault, engines[1].tampers = (None, True) if tampers else ("stage", False)
    with pytest.raises((EngineError, SyncError), match="second") as caught:
        bridge.publish(model, policy_version=1)
    assert not tampers or "w.lora_B.weight: the learner" in str(caught.value)
    assert [engine.receipt() for engine in engines] == [served, served], "no engine serves a version others could not"
    assert [engine.paused for engine in engines] == [True, True]


def test_a_fault_between_two_switches_leaves_every_engine_paused(engines: list[FakeEngine], tmp_path: Path) -> None:
    bridge, model = attached(engines, tmp_path)
    bridge.publish(model, policy_version=0)
    model.layers["w"].b.add_(1)
    engines[1].fault = "switch"
    with pytest.raises(EngineError, match="second failed to switch"):
        bridge.publish(model, policy_version=1)
    assert [engine.paused for engine in engines] == [True, True]


@pytest.mark.parametrize("call", ["stage", "switch", "resume"])
def test_an_engine_lost_on_the_way_is_left_out_until_it_is_back(
    engines: list[FakeEngine], tmp_path: Path, call: str
) -> None:
    bridge, model = attached(engines, tmp_path, min_engines=1)
    bridge.publish(model, policy_version=0)
    model.layers["w"].b.add_(1)
    engines[1].fault, engines[1].kind, engines[1].is_back = call, EngineGone, False
    report = bridge.publish(model, policy_version=1)
    assert (report.num_engines, engines[0].receipt(), engines[0].paused) == (1, report.receipt, False)
    engines[1].__init__("second")
    engines[1].base = parameter_digests([("w.weight", torch.ones(4, 3))])
    assert bridge.publish(model, policy_version=2).num_engines == 1, "another base stays out"
    engines[1].__init__("second")
    report = bridge.publish(model, policy_version=3)
    assert (report.num_engines, engines[1].receipt()) == (2, report.receipt)


def test_abort_pauses_only_for_the_switch(engines: list[FakeEngine], tmp_path: Path) -> None:
    bridge, model = attached(engines, tmp_path, in_flight="abort")
    report = bridge.publish(model, policy_version=0)
    assert engines[0].calls == ["stage", "pause abort", "switch", "resume"]
    assert report.pause_seconds > 0


def test_another_base_is_refused_by_parameter(engines: list[FakeEngine], tmp_path: Path) -> None:
    engines[1].base = parameter_digests([("w.weight", torch.ones(4, 3))])
    with pytest.raises(SyncError, match=r"(?s)second serves another base.*w\.weight: .*float32\[4, 3\]"):
        attached(engines, tmp_path)


def test_a_module_the_engine_cannot_adapt_is_refused_with_the_remedy(engines: list[FakeEngine], tmp_path: Path) -> None:
    engines[1].modules = {}
    message = r"(?s)second cannot hold.*bridge\.name to restart, which merges.*w: the engine cannot adapt this module"
    with pytest.raises(SyncError, match=message):
        attached(engines, tmp_path)


def test_a_base_that_is_split_over_ranks_is_not_shared_with_a_whole_one(
    engines: list[FakeEngine], tmp_path: Path
) -> None:
    engines[0].num_ranks = 2
    with pytest.raises(SyncError, match=r"first splits the base over 2 ranks.*bridge\.name to lora"):
        attached(engines, tmp_path, shares_base=True)
