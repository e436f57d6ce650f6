"""The processes that train one model together, as one of them sees it: who it is, and what it says to the others.

Every rank runs the same loop over the same groups; where ranks split the data, `pack` gives each its share. Rank 0
alone speaks to the outside world (engines, trajectories, metrics, disk); what it is answered there, or how it fails
there, `from_first` brings to all. Who waits: every other rank, for rank 0. Who unblocks: rank 0's next word, or its
end, which breaks the connections. Objects travel over gloo, so that a waiting rank leaves its GPU to the engine;
tensors on GPUs over NCCL.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from syncline.errors import SynclineError, TrainingError

TENSOR_PARALLEL = "tensor_parallel"
"""The mesh dimension over which each parameter is split; every rank of it sees every token."""
DATA_PARALLEL = "data_parallel"
"""The mesh dimension over which tokens are split; parameters are too (FSDP), but each is whole while it is used."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Ranks:
    """Of one learner; `ONE_RANK` is a learner of one process, for which everything here is a plain call."""

    rank: int = 0
    world_size: int = 1
    mesh: DeviceMesh | None = None
    dimension: str = TENSOR_PARALLEL
    """The mesh's one dimension: what the ranks split."""

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def split_data(self) -> bool:
        """Each rank sees other tokens: sums over tokens are the sums of all ranks'."""
        return self.world_size > 1 and self.dimension == DATA_PARALLEL

    def from_first(self, call: Callable[[], T]) -> T:
        """What `call` returns on rank 0, on every rank; what it raises there is raised on every rank.

        A rank on its way out of an exception meets nobody any more: rank 0 makes the call, others return `None`.
        """
        if self.world_size == 1:
            return call()
        if sys.exception() is not None:
            return call() if self.is_first else None  # pyright: ignore[reportReturnType]
        told: list[Any] = [_outcome(call, rank=0) if self.is_first else None]
        dist.broadcast_object_list(told, src=0, device=torch.device("cpu"))
        if isinstance(told[0], _Failure):
            raise told[0].error
        return told[0]

    def together(self, call: Callable[[], T]) -> T:
        """What `call`, in which ranks do not meet, returns on this rank; what the first raises that fails, all raise.

        For what may fail on some ranks alone, which would leave the others waiting for them.
        """
        if self.world_size == 1:
            return call()
        answer: list[T] = []
        told = self.gathered(_outcome(lambda: answer.append(call()), rank=self.rank))
        if failure := next(filter(None, told), None):
            raise failure.error
        return answer[0]

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks, in place, on every rank."""
        if self.mesh is not None:
            dist.all_reduce(tensor, group=self.mesh.get_group(self.dimension))
        return tensor

    def stacked(self, tensor: torch.Tensor) -> torch.Tensor:
        """`[...]` to `[ranks, ...]`: every rank's, on every rank. All must have one shape."""
        if self.mesh is None:
            return tensor[None]
        parts = [torch.empty_like(tensor) for _ in range(self.world_size)]
        dist.all_gather(parts, tensor.contiguous(), group=self.mesh.get_group(self.dimension))
        return torch.stack(parts)

    def gathered(self, value: T) -> list[T]:
        """Every rank's, by rank, on every rank: plain values, pickled."""
        if self.mesh is None:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.mesh.get_group(self.dimension))
        return values

    def broadcast_(self, tensor: torch.Tensor, *, source: int) -> None:
        """The bits of rank `source`'s contiguous tensor into every rank's, whatever their type."""
        if self.mesh is not None and tensor.numel():
            group = self.mesh.get_group(self.dimension)
            dist.broadcast(tensor.view(-1).view(torch.uint8), group=group, group_src=source)


ONE_RANK = Ranks()


@dataclass(frozen=True, slots=True)
class _Failure:
    error: SynclineError


def _outcome(call: Callable[[], Any], *, rank: int) -> Any:
    """The named boundary: whatever fails on one rank becomes what the others are told."""
    try:
        return call()
    except SynclineError as error:
        return _Failure(error)
    except Exception as error:
        failure = TrainingError(f"rank {rank} failed: {type(error).__name__}: {error}")
        failure.__cause__ = error
        return _Failure(failure)
