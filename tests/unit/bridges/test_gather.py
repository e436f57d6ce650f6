"""An FSDP-sharded learner of two ranks publishes whole weights; a fault of rank 0 reaches rank 1, and nobody hangs."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from fake_engine import FakeEngine

from syncline.bridges.broadcast import BroadcastBridge
from syncline.bridges.gather import GatheringBridge
from syncline.config.schema import Bridge
from syncline.errors import EngineError, EngineGone, SyncError

WORLD = 2


def make_model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 10), torch.nn.Linear(10, 3))


def export(model: torch.nn.Module) -> Any:
    return model.named_parameters()


def learner(rank: int, folder: str) -> None:
    """One rank: two versions that arrive, the second as changes alone; one of which an engine dies, the other takes;
    then one that this does not take either."""
    os.environ.update(MASTER_ADDR="127.0.0.1", GLOO_SOCKET_IFNAME="lo")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    from torch.distributed.fsdp import fully_shard

    reference, model = make_model(), make_model()
    for layer in model:
        fully_shard(layer)
    fully_shard(model)
    engine, mortal = (FakeEngine(f"engine {name}", dict(reference.named_parameters())) for name in "ab")
    config = Bridge(name="broadcast", bucket_bytes=128, timeout_seconds=5, sparse=True, min_engines=1)
    bridge = GatheringBridge(export=export) if rank else BroadcastBridge([engine, mortal], config, export=export)
    bridge.attach(model)
    changed = None
    for version in range(2):
        step(reference, model, biases_alone=version == 1)
        report = bridge.publish(model, policy_version=version)
        Path(folder, f"digest-{rank}-{version}").write_text(report.receipt.digest)
        changed = report.changed_fraction
    if rank == 0:
        assert changed is not None
        assert 0 < changed < 0.2
        assert all(torch.equal(engine.held(name), tensor) for name, tensor in reference.named_parameters())
    mortal.before_receive = die
    step(reference, model)
    report = bridge.publish(model, policy_version=2)
    assert rank or report.num_engines == 1
    assert rank or all(torch.equal(engine.held(name), tensor) for name, tensor in reference.named_parameters())
    engine.before_receive = refuse
    step(reference, model)
    with pytest.raises(SyncError) as fault:
        bridge.publish(model, policy_version=3)
    Path(folder, f"fault-{rank}").write_text(str(fault.value))
    bridge.close()
    engine.close()
    mortal.close()
    dist.destroy_process_group()


@torch.no_grad()
def step(*models: torch.nn.Module, biases_alone: bool = False) -> None:
    for model in models:
        for parameter in model.parameters():
            if parameter.dim() == 1 or not biases_alone:
                parameter.mul_(1.5)


def refuse() -> None:
    raise EngineError("engine a is broken")


def die() -> None:
    raise EngineGone("engine b is gone")


def test_every_rank_gathers_one_sends_and_its_fault_is_everybodys(tmp_path: Path) -> None:
    processes.spawn(learner, args=(str(tmp_path),), nprocs=WORLD)  # pyright: ignore[reportPrivateImportUsage]
    written = {path.name: path.read_text() for path in tmp_path.glob("*-*")}
    assert written["digest-0-1"] == written["digest-1-1"] != written["digest-0-0"]
    assert "engine a is broken" in written["fault-0"]
    assert written["fault-1"] == f"rank 0: {written['fault-0']}"
