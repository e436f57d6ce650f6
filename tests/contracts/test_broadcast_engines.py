"""`broadcast` with real engines of two ranks: two at once, whole or what changed; a learner killed in the middle, an
engine killed in the middle, and one that comes later."""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from outcomes import Noticed
from real_engine import (
    make_tiny_model,
    run_values,
    running_engine,
    starting_engine,
    told_process,
    visible_gpu,
    wait_until_ready,
)
from test_weight_bridge import DEVICE, DTYPE, TOLERANCE, Side, learner_device
from transformers import AutoModelForCausalLM

from syncline.bridges import sparse
from syncline.bridges.broadcast import BroadcastBridge
from syncline.bridges.receipt import parameter_digests
from syncline.config.schema import Bridge
from syncline.errors import EngineError, SyncError, SynclineError

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600), pytest.mark.contract("broadcast, two engines", 1)]
CONFIG = Bridge(name="broadcast", bucket_bytes=200_000, timeout_seconds=60 if torch.cuda.is_available() else 20)
DETECT_SECONDS = 10.0
RANKS = 1 if 0 < torch.cuda.device_count() < 5 else 2
"""Of each engine: NCCL's need a GPU each, and the learner another."""


@pytest.fixture(scope="module")
def sides(tmp_path_factory) -> Iterator[list[Side]]:
    folder = tmp_path_factory.mktemp("broadcast")
    model = make_tiny_model(folder / "model")
    values = engine_values(model, folder / "run", ranks=RANKS)
    others = _other_gpus()
    with (
        starting_engine(values, folder / "a") as first,
        starting_engine(values, folder / "b", environment=others) as second,
    ):
        wait_until_ready(first, second)
        yield [Side("broadcast", engine, model, folder, ranks=RANKS) for engine in (first, second)]


def engine_values(model: Path, folder: Path, *, ranks: int) -> dict:
    values = run_values(model, folder, bridge={"name": "broadcast"})
    gpus = list(range(ranks))
    engine = {"device": DEVICE, "devices": gpus, "tensor_parallel_size": ranks}
    values["engine"] |= engine
    values["learner"] = {"device": DEVICE, "devices": [ranks]}
    return values


def _other_gpus() -> dict[str, str]:
    """Beyond the first engine's and the learner's: two ranks on one GPU are none of NCCL's."""
    if not torch.cuda.is_available():
        return {}
    if torch.cuda.device_count() < 1 + 2 * RANKS:
        pytest.skip("two engines and a learner need three GPUs")
    return {"CUDA_VISIBLE_DEVICES": ",".join(map(visible_gpu, range(1 + RANKS, 1 + 2 * RANKS)))}


def bridge_to(sides: list[Side], **options: Any) -> BroadcastBridge:
    config = CONFIG.model_copy(update=options)
    return BroadcastBridge([side.engine for side in sides], config, export=lambda m: m.named_parameters())


def step(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)


def assert_torn(side: Side, *, named: str) -> None:
    """Paused, of no version and no digest, not to be resumed."""
    health = httpx.get(f"{side.engine.url}/health", timeout=10).json()
    assert health["paused"] is True
    assert health["policy_version"] == -1
    assert named in health["torn"]
    assert all(digest.endswith(":torn") for digest in side.engine.parameters().values())
    with pytest.raises(EngineError, match="publish one instead of resuming"):
        side.resume()


def test_two_engines_take_every_version_at_once(sides: list[Side]) -> None:
    model = AutoModelForCausalLM.from_pretrained(sides[0].model_path, dtype=DTYPE).to(
        learner_device("broadcast", ranks=RANKS)
    )
    bridge = bridge_to(sides)
    bridge.attach(model)
    for version in range(3):
        step(model)
        report = bridge.publish(model, policy_version=version)
        for side in sides:
            side.model = model
            assert side.engine.receipt() == report.receipt
            assert side.mismatch() < TOLERANCE
    bridge.close()


def test_changes_alone_reach_both_and_one_left_out_is_named_and_made_good(sides: list[Side], monkeypatch) -> None:
    model = sides[0].model
    bridge = bridge_to(sides, sparse=True)
    bridge.attach(model)
    version = sides[0].next_version()
    step(model)
    whole = bridge.publish(model, policy_version=version)
    nudge(model)
    few = bridge.publish(model, policy_version=version + 1)
    assert few.changed_fraction is not None
    assert 0.005 < few.changed_fraction < 0.02
    assert few.num_bytes < whole.num_bytes / 20
    assert all(side.mismatch() < TOLERANCE for side in sides)

    def truncated(new: torch.Tensor, changes: sparse.Difference) -> torch.Tensor:
        """As many as announced, but the last of them repeats the one before."""
        places, values = encode(new, changes).view(torch.int16).clone().chunk(2)
        places[-1], values[-1] = places[-2], values[-2]
        return torch.cat((places, values)).view(torch.uint8)

    encode = sparse.encode
    nudge(model)
    with monkeypatch.context() as spoilt:
        spoilt.setattr(sparse, "encode", truncated)
        with pytest.raises(SyncError, match=rf"{sides[0].engine.name} holds no version, .*\n.*: the learner"):
            bridge.publish(model, policy_version=version + 2)
    assert all(side.engine.health()["paused"] for side in sides)
    assert bridge.publish(model, policy_version=version + 2).num_bytes == whole.num_bytes
    assert all(side.mismatch() < TOLERANCE for side in sides)
    bridge.close()


def nudge(model: torch.nn.Module) -> None:
    """One value in a hundred, by much."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (torch.rand_like(parameter) < 0.01))


def test_a_learner_killed_in_the_middle_is_missed_by_the_engine_which_joins_the_next(
    sides: list[Side], noticed: Noticed
) -> None:
    side = sides[0]
    side.engine.pause(mode="abort", timeout_seconds=30)
    script = Path(__file__).parents[1] / "broadcast_learner.py"
    version = side.engine.receipt().policy_version
    place = learner_device("broadcast", ranks=RANKS)
    argv = [sys.executable, str(script), side.engine.url, str(side.model_path), place, str(version + 1)]
    with told_process(argv, "sending"):
        killed = time.monotonic()
    _until(lambda: httpx.get(f"{side.engine.url}/health", timeout=30).json()["torn"], "waited for the learner")
    assert time.monotonic() - killed < DETECT_SECONDS
    assert_torn(side, named="waited for the learner")
    noticed("learner killed at an update", "broadcast", by="engine", told=side.engine.health()["torn"])

    bridge = bridge_to([side])
    bridge.attach(side.model)
    report = bridge.publish(side.model, policy_version=version + 2)
    assert side.engine.receipt() == report.receipt
    assert side.mismatch() < TOLERANCE
    bridge.close()


def _until(answer: Callable[[], str | None], wanted: str) -> None:
    deadline = time.monotonic() + CONFIG.timeout_seconds
    while wanted not in (last := answer() or ""):
        assert time.monotonic() < deadline, f"the engine did not name what it missed: {last!r}"
        time.sleep(0.1)


def test_an_engine_killed_in_the_middle_is_named_and_the_other_joins_again(sides: list[Side], noticed: Noticed) -> None:
    victim, survivor = sides[1], sides[0]
    version = 10
    sending: list[bool] = []

    def export(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
        sending.append(True)
        for i, item in enumerate(model.named_parameters()):
            if len(sending) == 5 and i == 8:
                os.killpg(victim.engine.process.pid, signal.SIGKILL)  # type: ignore[attr-defined]
            yield item

    bridge = BroadcastBridge([side.engine for side in sides], CONFIG, export=export)
    bridge.attach(survivor.model)
    step(survivor.model)
    bridge.publish(survivor.model, policy_version=version)
    step(survivor.model)
    started = time.monotonic()
    with pytest.raises(SyncError, match=f"{victim.engine.name}: ") as told:
        bridge.publish(survivor.model, policy_version=version + 1)
    assert time.monotonic() - started < DETECT_SECONDS
    health = survivor.engine.health()
    if health["policy_version"] == version + 1:  # NCCL, which does not wait for all, had passed everything on to it
        assert health["paused"] is True
        assert survivor.engine.measure()[1] == parameter_digests(survivor.model.named_parameters())
    else:
        assert_torn(survivor, named="waited for the learner")
    noticed("engine killed at an update", "broadcast", by="learner, and the other engine", told=told.value)
    with pytest.raises(SynclineError, match=victim.engine.url):
        bridge.publish(survivor.model, policy_version=version + 1)
    bridge.close()

    bridge = bridge_to([survivor])
    bridge.attach(survivor.model)
    bridge.publish(survivor.model, policy_version=version + 1)
    assert survivor.mismatch() < TOLERANCE
    bridge.close()


def test_an_engine_that_comes_later_claims_nothing_until_it_has_the_version_of_the_others(
    sides: list[Side], tmp_path: Path
) -> None:
    """One rank beside two; it starts from the same checkpoint that the others have long left."""
    survivor = sides[0]
    version, model_path = survivor.engine.receipt().policy_version, survivor.model_path
    values = engine_values(model_path, tmp_path / "run", ranks=1)
    with running_engine(values, tmp_path / "c", environment=_other_gpus()) as engine:
        late = Side("broadcast", engine, model_path, tmp_path, ranks=RANKS)
        late.model = survivor.model
        assert {completion.versions for completion in late.sample(max_tokens=3)} == {()}
        bridge = bridge_to([survivor, late], sparse=True)
        bridge.attach(survivor.model)
        report = bridge.publish(survivor.model, policy_version=version)
        for side in (survivor, late):
            assert side.engine.receipt() == report.receipt
            assert {span.policy_version for c in side.sample() for span in c.versions} == {version}
            assert side.mismatch() < TOLERANCE
        nudge(survivor.model)
        assert bridge.publish(survivor.model, policy_version=version + 1).changed_fraction is not None
        assert late.engine.receipt() == survivor.engine.receipt()
        bridge.close()
