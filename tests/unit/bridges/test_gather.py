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
from syncline.errors import SyncError

WORLD = 2


def make_model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 10), torch.nn.Linear(10, 3))


def export(model: torch.nn.Module) -> Any:
    return model.named_parameters()


def learner(rank: int, folder: str, *, fails: bool) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", GLOO_SOCKET_IFNAME="lo")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    from torch.distributed.fsdp import fully_shard

    whole = make_model()
    model = make_model()
    for layer in model:
        fully_shard(layer)
    fully_shard(model)
    engine = FakeEngine("engine a", dict(whole.named_parameters()))
    config = Bridge(name="broadcast", bucket_bytes=128, timeout_seconds=30)
    bridge = GatheringBridge(export=export) if rank else BroadcastBridge([engine], config, export=export)
    bridge.attach(model)
    if fails and rank == 0:
        engine.before_receive = _die
    try:
        for version in range(2):
            with torch.no_grad():
                for sharded, one in zip(model.parameters(), whole.parameters(), strict=True):
                    sharded.mul_(1.5)
                    one.mul_(1.5)
            receipt = bridge.publish(model, policy_version=version).receipt
            Path(folder, f"rank-{rank}-{version}").write_text(receipt.digest)
        if rank == 0:
            assert all(torch.equal(engine.held(name), one) for name, one in whole.named_parameters())
    except SyncError as error:
        Path(folder, f"fault-{rank}").write_text(str(error))
    finally:
        bridge.close()
        engine.close()
        dist.destroy_process_group()


def _die() -> None:
    from syncline.errors import EngineError

    raise EngineError("engine a is gone")


def run(rank: int, folder: str, fails: bool) -> None:
    learner(rank, folder, fails=fails)


@pytest.mark.parametrize("fails", [False, True])
def test_every_rank_gathers_and_one_sends(tmp_path: Path, fails: bool) -> None:
    processes.spawn(run, args=(str(tmp_path), fails), nprocs=WORLD)  # pyright: ignore[reportPrivateImportUsage]
    written = {path.name: path.read_text() for path in tmp_path.iterdir() if path.name != "store"}
    if fails:
        assert sorted(written) == ["fault-0", "fault-1"]
        assert all("engine a is gone" in fault for fault in written.values())
    else:
        assert sorted(written) == ["rank-0-0", "rank-0-1", "rank-1-0", "rank-1-1"]
        assert written["rank-0-1"] == written["rank-1-1"] != written["rank-0-0"]
