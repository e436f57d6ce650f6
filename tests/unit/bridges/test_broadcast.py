"""The learner's end of `broadcast`, over gloo to engines of plain tensors: who is told, proved, missed, rejoined."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from fake_engine import FakeEngine

from syncline.bridges.broadcast import BroadcastBridge
from syncline.bridges.receipt import model_digest, parameter_digests
from syncline.config.schema import Bridge
from syncline.errors import EngineError, SyncError

CONFIG = Bridge(name="broadcast", bucket_bytes=256, timeout_seconds=20)


def make_model(seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(8, 12), torch.nn.Linear(12, 4, bias=False))


def named(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters())


@pytest.fixture
def engines() -> Iterator[list[FakeEngine]]:
    like = named(make_model(0))
    engines = [FakeEngine("engine a", like, num_workers=2), FakeEngine("engine b", like)]
    yield engines
    for engine in engines:
        engine.close()


def bridge_to(engines: list[FakeEngine], **options: Any) -> BroadcastBridge:
    config = CONFIG.model_copy(update=options)
    return BroadcastBridge(engines, config, export=lambda model: model.named_parameters())  # pyright: ignore


def step(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))


def assert_serves(engine: FakeEngine, model: torch.nn.Module, *, policy_version: int) -> None:
    assert engine.receipt().policy_version == policy_version
    assert all(torch.equal(engine.held(name), tensor) for name, tensor in named(model).items())


def test_every_engine_and_worker_takes_each_version_between_one_pause_and_one_resume(engines) -> None:
    model, bridge = make_model(1), bridge_to(engines)
    bridge.attach(model)
    for version in range(3):
        step(model)
        report = bridge.publish(model, policy_version=version)
        assert report.receipt.digest == model_digest(parameter_digests(model.named_parameters()))
        for engine in engines:
            assert_serves(engine, model, policy_version=version)
        assert report.num_bytes >= sum(p.numel() * p.element_size() for p in model.parameters())
    for engine in engines:
        assert engine.calls == ["join"] + ["pause drain", "receive", "resume"] * 3
    bridge.close()


def test_unchanged_weights_are_named_anew_and_move_no_bytes(engines) -> None:
    model, bridge = make_model(1), bridge_to(engines)
    bridge.attach(model)
    bridge.publish(model, policy_version=0)
    assert bridge.publish(model, policy_version=1).num_bytes == 0
    for engine in engines:
        assert_serves(engine, model, policy_version=1)
        assert engine.calls[-3:] == ["pause drain", "adopt", "resume"]


def test_an_engine_that_came_up_anew_gets_the_version_the_others_hold(engines) -> None:
    model, bridge = make_model(1), bridge_to(engines)
    bridge.attach(model)
    bridge.publish(model, policy_version=0)
    engines[1].restart()
    bridge.publish(model, policy_version=0)
    for engine in engines:
        assert_serves(engine, model, policy_version=0)
        assert engine.calls.count("join") == 2


def test_an_engine_lost_on_the_way_is_named_and_no_engine_resumes(engines) -> None:
    model, bridge = make_model(1), bridge_to(engines)
    bridge.attach(model)
    bridge.publish(model, policy_version=0)
    step(model)

    def die() -> None:
        raise EngineError("engine b broke off /syncline/broadcast/receive")

    engines[1].before_receive = die
    with pytest.raises(SyncError) as lost:
        bridge.publish(model, policy_version=1)
    text = str(lost.value)
    assert text.startswith("the broadcast of version 1 failed: ")
    assert "\nengine b: engine b broke off" in text
    assert "\nengine a: rank 0: waited for the learner" in text
    for engine in engines:
        assert engine.calls[-1] == "pause abort"
        assert engine.receipt().policy_version == -1

    engines[1].before_receive = lambda: None
    bridge.publish(model, policy_version=1)
    for engine in engines:
        assert_serves(engine, model, policy_version=1)


@pytest.mark.parametrize("num_engines", [1, 2])
def test_no_engine_resumes_unless_all_hold_what_was_sent(engines, num_engines: int) -> None:
    model, bridge = make_model(1), bridge_to(engines[-num_engines:])
    bridge.attach(model)
    bridge.publish(model, policy_version=0)
    step(model)
    engines[1].after_receive = lambda: engines[1].held("0.weight").add_(1)
    with pytest.raises(SyncError, match=r"engine b holds no version, .* version 1(.|\n)*0\.weight: the learner"):
        bridge.publish(model, policy_version=1)
    for engine in engines[-num_engines:]:
        assert engine.calls[-2:] == ["receive", "pause abort"]


def test_a_learner_whose_export_fails_half_way_tells_the_engines(engines) -> None:
    model, failing = make_model(1), []

    def export(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
        reads.append(None)
        for i, item in enumerate(model.named_parameters()):
            if failing and len(reads) == 3 and i == 1:  # named, prepared, sent
                raise RuntimeError("out of memory")
            yield item

    reads: list[None] = []
    bridge = BroadcastBridge(engines, CONFIG, export=export)
    bridge.attach(model)
    failing.append(True)
    reads.clear()
    with pytest.raises(RuntimeError, match="out of memory"):
        bridge.publish(model, policy_version=0)
    assert all(engine.calls[-1] == "pause abort" for engine in engines)
    assert all(engine.receipt().policy_version == -1 for engine in engines)


def test_an_engine_of_another_model_is_refused_by_parameter_name(engines) -> None:
    other = torch.nn.Sequential(torch.nn.Linear(8, 12), torch.nn.Linear(12, 5, bias=False))
    with pytest.raises(SyncError, match=r"1\.weight: the learner float32\[5, 12\], the engine float32\[4, 12\]"):
        bridge_to(engines).attach(other)


def test_an_older_version_is_refused_before_anything_moves(engines) -> None:
    model, bridge = make_model(1), bridge_to(engines)
    bridge.attach(model)
    bridge.publish(model, policy_version=3)
    with pytest.raises(SyncError, match="policy_version 2 is older than 3"):
        bridge.publish(model, policy_version=2)


def test_an_engine_that_cannot_join_is_named_and_no_other_waits_for_it(engines, monkeypatch) -> None:
    def refuse(*_: object, **__: object) -> str:
        raise EngineError("engine b answered 409: no memory for two buckets")

    monkeypatch.setattr(engines[1], "join_broadcast", refuse)
    with pytest.raises(SyncError) as refused:
        bridge_to(engines).attach(make_model(1))
    assert "\nengine b: engine b answered 409: no memory for two buckets" in str(refused.value)
    assert "\nengine a: rank 0: the learner left: engine b answered" in str(refused.value)
