"""The learner's ranks: who this process is, and what ranks say to each other beside the model's own collectives.

Every rank runs the same loop over the same groups. Rank 0 alone has the outside world (engine, trajectories, metrics,
disk); what it is answered there, or how it fails there, `from_first` brings to all. Who waits: every other rank, for
rank 0, over gloo, so that a waiting rank leaves its GPU to the engine; tensors go over NCCL. Who unblocks: rank 0's
next word. Every collective has a deadline, and a rank that ends breaks its connections, which ends the others.
"""

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from syncline.errors import SynclineError, TrainingError

TENSOR_PARALLEL = "tensor_parallel"
"""The mesh dimension over which each parameter is split; every rank of it sees every token."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Ranks:
    """Of one learner; `ONE_RANK` is a learner of one process, for which everything here is a plain call."""

    rank: int = 0
    world_size: int = 1
    mesh: DeviceMesh | None = None

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def from_first(self, call: Callable[[], T]) -> T:
        """What `call` returns on rank 0, on every rank; what it raises there is raised on every rank.

        A rank on its way out of an exception meets nobody any more: rank 0 makes the call, others return `None`.
        """
        if self.world_size == 1:
            return call()
        if sys.exception() is not None:
            return call() if self.is_first else None  # pyright: ignore[reportReturnType]
        told: list[Any] = [_outcome(call) if self.is_first else None]
        dist.broadcast_object_list(told, src=0, device=torch.device("cpu"))
        if isinstance(told[0], _Failure):
            raise told[0].error
        return told[0]

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks, in place, on every rank."""
        if self.mesh is not None:
            dist.all_reduce(tensor, group=self.mesh.get_group(TENSOR_PARALLEL))
        return tensor

    def stacked(self, tensor: torch.Tensor) -> torch.Tensor:
        """`[...]` to `[ranks, ...]`: every rank's, on every rank. All must have one shape."""
        if self.mesh is None:
            return tensor[None]
        parts = [torch.empty_like(tensor) for _ in range(self.world_size)]
        dist.all_gather(parts, tensor.contiguous(), group=self.mesh.get_group(TENSOR_PARALLEL))
        return torch.stack(parts)

    def gathered(self, value: T) -> list[T]:
        """Every rank's, by rank, on every rank: plain values, pickled."""
        if self.mesh is None:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.mesh.get_group(TENSOR_PARALLEL))
        return values

    def broadcast_(self, tensor: torch.Tensor, *, source: int) -> None:
        """The bits of rank `source`'s contiguous tensor into every rank's, whatever their type."""
        if self.mesh is not None and tensor.numel():
            group = self.mesh.get_group(TENSOR_PARALLEL)
            dist.broadcast(tensor.view(-1).view(torch.uint8), group=group, group_src=source)


ONE_RANK = Ranks()


@dataclass(frozen=True, slots=True)
class _Failure:
    error: SynclineError


def _outcome(call: Callable[[], Any]) -> Any:
    """The named boundary: whatever fails on rank 0 becomes what the other ranks are told."""
    try:
        return call()
    except SynclineError as error:
        return _Failure(error)
    except Exception as error:
        failure = TrainingError(f"rank 0 failed: {type(error).__name__}: {error}")
        failure.__cause__ = error
        return _Failure(failure)


class OnFirst:
    """A part that rank 0 alone has, such as an engine's control or a rollout source: every rank makes every call,
    rank 0 carries it out, and all get its answer or its error. So whoever holds one need not know of ranks."""

    def __init__(self, part: Any, ranks: Ranks) -> None:
        """`part` may be `None` on other ranks than 0."""
        self._part = part
        self._ranks = ranks
        self.name: str = ranks.from_first(lambda: getattr(part, "name", type(part).__name__))

    def __getattr__(self, method: str) -> Callable[..., Any]:
        if method.startswith("_"):
            raise AttributeError(method)
        return lambda *args, **kwargs: self._ranks.from_first(lambda: getattr(self._part, method)(*args, **kwargs))


def rank_of(environment: Mapping[str, str]) -> int:
    """0 for a process that torchrun did not start."""
    return int(environment.get("RANK", 0))


@contextmanager
def joined_ranks(device: torch.device, *, timeout_seconds: float) -> Iterator[Ranks]:
    """The ranks of a torchrun start (`RANK`, `WORLD_SIZE`, `MASTER_ADDR`, `MASTER_PORT`), or the one rank without.

    `device` is this rank's. Raises `TrainingError` naming this rank when another one is lost or past the deadline.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield ONE_RANK
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    rank, size = rank_of(os.environ), int(os.environ["WORLD_SIZE"])
    try:
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_seconds))
        yield Ranks(rank, size, init_device_mesh(device.type, (size,), mesh_dim_names=(TENSOR_PARALLEL,)))
    except RuntimeError as error:
        if not _is_collective(error):
            raise
        raise TrainingError(
            f"rank {rank} of {size} lost another rank, or waited for it longer than {timeout_seconds:g} s: {error}"
        ) from error
    dist.destroy_process_group()


def _is_collective(error: RuntimeError) -> bool:
    """gloo raises plain `RuntimeError`s that name the place in gloo and the peer's address."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)
