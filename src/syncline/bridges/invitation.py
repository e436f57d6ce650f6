"""What the learner tells its engines so that they join its group with the same plan: both ends of that wire."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from syncline.bridges.buckets import Entry, Plan, plan
from syncline.bridges.collective import Seat
from syncline.bridges.handles import device_name


@dataclass(frozen=True, slots=True)
class Invitation:
    """`host` and `port` are where the parties meet; `generation` is the group's name, another for every group."""

    host: str
    port: int
    size: int
    generation: str
    bucket_bytes: int
    device: str
    """The learner's: `"cpu"`, or the UUID of its GPU, on which no engine may be."""
    manifest: tuple[Entry, ...]
    """Every parameter, in the order in which the learner sends."""
    sparse: bool = False
    """Whether the learner may send what changed in a bucket instead of the bucket (`sparse.py`)."""

    def seat(self, rank: int) -> Seat:
        return Seat(self.host, self.port, rank, self.size, self.generation)

    def plan(self) -> Plan:
        return plan(self.manifest, bucket_bytes=self.bucket_bytes)

    def to_wire(self) -> dict[str, Any]:
        """As JSON and msgpack carry it."""
        return asdict(self) | {"manifest": [[entry.name, entry.dtype, list(entry.shape)] for entry in self.manifest]}

    @classmethod
    def from_wire(cls, wire: Mapping[str, Any]) -> "Invitation":
        manifest = tuple(Entry(name, dtype, tuple(shape)) for name, dtype, shape in wire["manifest"])
        return cls(**{**wire, "manifest": manifest})


def manifest_of(named: Iterable[tuple[str, torch.Tensor]]) -> tuple[tuple[Entry, ...], torch.device]:
    """The entries, and the device of the tensors. Holds no tensor longer than it looks at it."""
    entries: list[Entry] = []
    device = torch.device("cpu")
    for name, tensor in named:
        entries.append(Entry.of(name, tensor))
        device = tensor.device
    return tuple(entries), device


def same_gpu(learner: str, engine: torch.device) -> bool:
    """NCCL has no group with two ranks on one GPU."""
    return learner != "cpu" and learner == device_name(engine)
