"""Engines that die under a `broadcast`: who goes on, who must stop, and what one that comes back has to prove."""

from collections.abc import Callable, Iterator

import pytest
import torch
from fake_engine import FakeEngine
from test_broadcast import assert_serves, bridge_to, make_model, named, step

from syncline.bridges.fleet import Lost
from syncline.errors import EngineError, EngineGone, EngineTimeout, SyncError
from syncline.protocols import Paused


class MortalEngine(FakeEngine):
    """Can be gone, as a killed process is: everything asked of it breaks off."""

    gone: EngineError | None = None

    def die(self, fault: EngineError | None = None) -> None:
        self.gone = fault or EngineGone(f"{self.name} broke off")
        self._leave()

    def come_back(self) -> None:
        self.gone = None
        self.restart()
        self.calls.clear()

    def wait_until_ready(self, *, timeout_seconds: float) -> None:
        if self.gone:
            raise EngineTimeout(f"{self.name} was not ready after {timeout_seconds:g} s")

    def pause(self, *, mode: str, timeout_seconds: float, reuse_kv: bool = False) -> Paused:
        if self.gone:
            raise self.gone
        return super().pause(mode=mode, timeout_seconds=timeout_seconds, reuse_kv=reuse_kv)


@pytest.fixture
def engines() -> Iterator[list[MortalEngine]]:
    engines = [MortalEngine(f"engine {name}", named(make_model(0))) for name in "abc"]
    yield engines
    for engine in engines:
        engine.close()


def attached(engines: list[MortalEngine], **options):
    model = make_model(1)
    bridge = bridge_to(engines, timeout_seconds=3, **options)  # type: ignore[arg-type]
    bridge.attach(model)
    bridge.publish(model, policy_version=0)
    step(model)
    return model, bridge


def dies_while_receiving(engine: MortalEngine) -> Callable[[], None]:
    def die() -> None:
        engine.die()
        raise EngineGone(f"{engine.name} broke off /syncline/broadcast/receive")

    return die


def test_a_dead_engine_is_left_out_and_proved_anew_when_it_is_back(engines: list[MortalEngine]) -> None:
    model, bridge = attached(engines, min_engines=2)
    engines[1].die()
    report = bridge.publish(model, policy_version=1)
    assert (report.num_engines, report.num_lost) == (2, 1)
    for engine in (engines[0], engines[2]):
        assert_serves(engine, model, policy_version=1)

    engines[1].come_back()
    step(model)
    report = bridge.publish(model, policy_version=2)
    assert (report.num_engines, report.num_lost) == (3, 0)
    for engine in engines:
        assert_serves(engine, model, policy_version=2)
    assert engines[1].calls == ["pause drain", "join", "receive", "resume"], "it resumed after its own proof"
    bridge.close()


def test_one_that_dies_in_mid_broadcast_does_not_take_the_others_with_it(engines: list[MortalEngine]) -> None:
    model, bridge = attached(engines, min_engines=1)
    engines[2].before_receive = dies_while_receiving(engines[2])
    report = bridge.publish(model, policy_version=1)
    assert report.num_engines == 2
    for engine in engines[:2]:
        assert_serves(engine, model, policy_version=1)
        assert engine.calls[-4:] == ["pause drain", "join", "receive", "resume"], "what broke off was begun anew"
    bridge.close()


def test_more_losses_than_allowed_stop_the_run_with_every_engine_paused(engines: list[MortalEngine]) -> None:
    model, bridge = attached(engines, min_engines=2)
    for engine in engines[1:]:
        engine.die()
    with pytest.raises(EngineGone, match="engine b broke off") as stopped:
        bridge.publish(model, policy_version=1)
    assert not isinstance(stopped.value, Lost)
    assert engines[0].calls[-1] == "pause abort"
    bridge.close()


def test_without_leave_the_first_loss_stops_the_run(engines: list[MortalEngine]) -> None:
    model, bridge = attached(engines)
    engines[0].die(EngineTimeout("engine a did not answer /syncline/pause in 20 s"))
    with pytest.raises(EngineTimeout, match="did not answer"):
        bridge.publish(model, policy_version=1)
    bridge.close()


def test_wrong_weights_are_never_a_loss(engines: list[MortalEngine]) -> None:
    model, bridge = attached(engines, min_engines=1)
    engines[1].after_receive = lambda: engines[1].held("0.weight").add_(1)
    with pytest.raises(SyncError, match=r"engine b holds no version"):
        bridge.publish(model, policy_version=1)
    assert {engine.calls[-1] for engine in engines} == {"pause abort"}
    bridge.close()


def test_an_answer_of_an_engine_that_still_lives_is_never_a_loss(engines: list[MortalEngine]) -> None:
    model, bridge = attached(engines, min_engines=1)

    def refuse() -> None:
        raise EngineError("engine b: CUDA error")

    engines[1].before_receive = refuse
    with pytest.raises(SyncError, match="engine b: CUDA error"):
        bridge.publish(model, policy_version=1)
    bridge.close()


def test_one_that_comes_back_with_another_model_stays_out(engines: list[MortalEngine]) -> None:
    model, bridge = attached(engines, min_engines=2)
    engines[1].die()
    bridge.publish(model, policy_version=1)
    engines[1].come_back()
    engines[1]._held["0.weight"] = torch.zeros(3, 3)
    assert bridge.publish(model, policy_version=2).num_engines == 2
    assert "resume" not in engines[1].calls
    bridge.close()
