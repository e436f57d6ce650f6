"""A learner of several processes: how they meet, and how parts that one of them has serve all.

The ranks are a torchrun start's, of one host or of several. Every collective has a deadline, and a rank that ends
breaks its connections, which ends the others: nobody waits for the dead. Whoever gives up says so in the store where
the ranks met; who is silent there is who was waited for.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from syncline.bridges.ranks import ONE_RANK, TENSOR_PARALLEL, Ranks
from syncline.config.schema import Learner
from syncline.errors import ConfigError, TrainingError

ROLL_CALL_SECONDS = 5.0
"""How long ranks that gave up wait for each other to say so."""


def num_ranks(learner: Learner) -> int:
    return learner.tensor_parallel_size * learner.data_parallel_size


def refuse_other_number(learner: Learner) -> None:
    """Raises `ConfigError` when torchrun started another number of ranks than the configuration has."""
    started, field = int(os.environ.get("WORLD_SIZE", 1)), "data_parallel_size"
    if learner.tensor_parallel_size > 1:
        field = "tensor_parallel_size"
    if started != num_ranks(learner):
        fault = f"{getattr(learner, field)}, but torchrun started {started} ranks; set it to {started}"
        raise ConfigError([f"learner.{field}: {fault}, or start {num_ranks(learner)} ranks"])


def rank_device(device: torch.device) -> torch.device:
    """This rank's own of the visible GPUs, made current; the CPU is everybody's."""
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    return device


@contextmanager
def joined_ranks(device: torch.device, *, timeout_seconds: float, dimension: str = TENSOR_PARALLEL) -> Iterator[Ranks]:
    """The ranks of a torchrun start (`RANK`, `WORLD_SIZE`, `MASTER_ADDR`, `MASTER_PORT`), or the one rank without.

    `device` is this rank's, `dimension` what the ranks split. Raises `TrainingError` naming the ranks that are lost or
    past the deadline.
    """
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size == 1:
        yield ONE_RANK
        return
    rank = int(os.environ["RANK"])
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_seconds))
        yield Ranks(rank, size, init_device_mesh(device.type, (size,), mesh_dim_names=(dimension,)), dimension)
    except RuntimeError as error:
        if not _is_collective(error):
            raise
        raise TrainingError(
            f"rank {rank} of {size} lost {_silent(rank, size)}, or waited for it longer than {timeout_seconds:g} s: "
            f"{error}"
        ) from error
    dist.destroy_process_group()


def _silent(rank: int, size: int) -> str:
    """The ranks that say nothing while those that gave up say so; `another rank` when that cannot be known."""
    if not dist.is_initialized():
        return "another rank"
    try:
        store = dist.distributed_c10d._get_default_store()
        store.set(f"gave-up/{rank}", "")
        deadline = time.monotonic() + ROLL_CALL_SECONDS
        while silent := [r for r in range(size) if not store.check([f"gave-up/{r}"])]:
            if time.monotonic() > deadline:
                break
            time.sleep(0.1)
    except RuntimeError:  # the store has died with the rank, or the launcher, that held it
        return "another rank"
    if not silent:
        return "a connection between ranks"
    return f"rank {silent[0]}" if len(silent) == 1 else f"one of the ranks {', '.join(map(str, silent))}"


def _is_collective(error: RuntimeError) -> bool:
    """gloo raises plain `RuntimeError`s, which name the place in gloo and the peer's address."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def on_first(part: Any, ranks: Ranks) -> Any:
    """A part that rank 0 alone has (`None` elsewhere), such as a rollout source, for all: every rank makes every call,
    rank 0 carries it out, and each gets its answer or its error. So whoever holds one need not know of ranks."""
    return part if ranks.world_size == 1 else _OnFirst(part, ranks)


class _OnFirst:
    def __init__(self, part: Any, ranks: Ranks) -> None:
        self._part = part
        self._ranks = ranks

    def __getattr__(self, method: str) -> Callable[..., Any]:
        if method.startswith("_"):
            raise AttributeError(method)
        return lambda *args, **kwargs: self._ranks.from_first(lambda: getattr(self._part, method)(*args, **kwargs))
