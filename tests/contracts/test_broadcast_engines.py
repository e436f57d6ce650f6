"""`broadcast` with real engines: two at once, a learner killed in the middle of it, an engine killed in the middle."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
import torch
from real_engine import make_tiny_model, run_values, running_engine
from test_weight_bridge import DTYPE, TOLERANCE, Side, learner_device
from transformers import AutoModelForCausalLM

from syncline.bridges.broadcast import BroadcastBridge
from syncline.config.schema import Bridge
from syncline.errors import EngineError, SyncError, SynclineError

pytestmark = pytest.mark.e2e
CONFIG = Bridge(name="broadcast", bucket_bytes=200_000, timeout_seconds=20)
DETECT_SECONDS = 10.0


@pytest.fixture(scope="module")
def sides(tmp_path_factory) -> Iterator[list[Side]]:
    folder = tmp_path_factory.mktemp("broadcast")
    model = make_tiny_model(folder / "model")
    engine = {"kv_cache_bytes": 64 << 20, "gpu_memory_utilization": 0.2}
    values = run_values(model, folder / "run", bridge={"name": "broadcast"}, engine=engine)
    with (
        running_engine(values, folder / "a") as first,
        running_engine(values, folder / "b", environment=_last_gpu()) as second,
    ):
        yield [Side("broadcast", engine, model, folder) for engine in (first, second)]


def _last_gpu() -> dict[str, str]:
    """Two ranks on one GPU are none of NCCL's, so the second engine needs one of its own."""
    if not torch.cuda.is_available():
        return {}
    if torch.cuda.device_count() < 3:
        pytest.skip("two engines and a learner need three GPUs")
    return {"CUDA_VISIBLE_DEVICES": "2"}


def bridge_to(sides: list[Side]) -> BroadcastBridge:
    return BroadcastBridge([side.engine for side in sides], CONFIG, export=lambda m: m.named_parameters())


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
    model = AutoModelForCausalLM.from_pretrained(sides[0].model_path, dtype=DTYPE).to(learner_device("broadcast"))
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


def test_a_learner_killed_in_the_middle_is_missed_by_the_engine_which_joins_the_next(sides: list[Side]) -> None:
    side = sides[0]
    side.engine.pause(mode="abort", timeout_seconds=30)
    script = Path(__file__).parents[1] / "broadcast_learner.py"
    argv = [sys.executable, str(script), side.engine.url, str(side.model_path), learner_device("broadcast")]
    version = side.engine.receipt().policy_version
    with subprocess.Popen([*argv, str(version + 1)], stdout=subprocess.PIPE, text=True) as learner:
        assert learner.stdout is not None
        assert learner.stdout.readline() == "sending\n"
        learner.send_signal(signal.SIGKILL)
        killed = time.monotonic()
    _until(lambda: httpx.get(f"{side.engine.url}/health", timeout=30).json()["torn"], "waited for the learner")
    assert time.monotonic() - killed < DETECT_SECONDS
    assert_torn(side, named="waited for the learner")

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


def test_an_engine_killed_in_the_middle_is_named_and_the_other_joins_again(sides: list[Side]) -> None:
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
    with pytest.raises(SyncError, match=f"{victim.engine.name}: "):
        bridge.publish(survivor.model, policy_version=version + 1)
    assert time.monotonic() - started < DETECT_SECONDS
    assert_torn(survivor, named="waited for the learner")
    with pytest.raises(SynclineError, match=victim.engine.url):
        bridge.publish(survivor.model, policy_version=version + 1)
    bridge.close()

    bridge = bridge_to([survivor])
    bridge.attach(survivor.model)
    bridge.publish(survivor.model, policy_version=version + 1)
    assert survivor.mismatch() < TOLERANCE
    bridge.close()
