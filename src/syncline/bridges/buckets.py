"""Parameters in flat buckets: the plan both sides compute alike, and the copies in and out of a bucket.

A collective call costs some 20 µs whatever its size, so parameters travel many to a call: rows of parameters, one
after the other, in buffers of `bucket_bytes`. A parameter that does not fit into what is left of a bucket goes on in
the next, cut between two rows; a receiver that holds a tensor-parallel shard takes its part of the rows out.

Why packed, and not a grouped broadcast of each parameter in place: a merged adapter or a gathered FSDP parameter has
no place of its own, a tensor-parallel receiver has none for the whole parameter, and packing costs two passes over
the memory at ten times the link's speed, beside the sending. `torch._foreach_copy_` makes it one call a bucket.
"""

import hashlib
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from syncline.bridges.manifest import Shard
from syncline.bridges.receipt import kind_of
from syncline.errors import SyncError

ALIGNMENT = 16
"""Bytes; the widest load of a copy kernel."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A whole parameter: `("model.norm.weight", "bfloat16", (896,))`."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @classmethod
    def of(cls, name: str, tensor: torch.Tensor) -> "Entry":
        return cls(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))

    @property
    def kind(self) -> str:
        """As `receipt.kind_of` has it for the tensor."""
        return f"{self.dtype}{list(self.shape)}"

    @property
    def num_rows(self) -> int:
        return self.shape[0] if self.shape else 1

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * getattr(torch, self.dtype).itemsize


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows `[start, stop)` of a parameter, `offset` bytes into their bucket."""

    entry: Entry
    start: int
    stop: int
    offset: int

    @property
    def num_bytes(self) -> int:
        return (self.stop - self.start) * self.entry.row_bytes

    @property
    def is_whole(self) -> bool:
        return self.stop - self.start == self.entry.num_rows

    def view(self, bucket: torch.Tensor) -> torch.Tensor:
        """The piece's place in `bucket` `[bytes]` uint8, in the piece's own type and shape."""
        place = bucket[self.offset : self.offset + self.num_bytes]
        shape = (self.stop - self.start, *self.entry.shape[1:]) if self.entry.shape else ()
        return place.view(getattr(torch, self.entry.dtype)).view(shape)


@dataclass(frozen=True, slots=True)
class Bucket:
    """What one collective call carries."""

    pieces: tuple[Piece, ...]
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Plan:
    """Every row of every parameter, once, in the manifest's order."""

    buckets: tuple[Bucket, ...]
    digest: str
    """Equal on both sides, or they would cut the stream differently."""

    @property
    def capacity(self) -> int:
        """Bytes of a buffer that holds any of the buckets."""
        return max((bucket.num_bytes for bucket in self.buckets), default=0)

    @property
    def num_bytes(self) -> int:
        """What a publish moves."""
        return sum(bucket.num_bytes for bucket in self.buckets)


def plan(manifest: Sequence[Entry], *, bucket_bytes: int) -> Plan:
    """A row is never cut, so a bucket is as large as the largest row if that exceeds `bucket_bytes`."""
    buckets: list[Bucket] = []
    pieces: list[Piece] = []
    used = 0
    for entry in manifest:
        row = 0
        while row < entry.num_rows and entry.row_bytes:
            num_rows = min((bucket_bytes - used) // entry.row_bytes, entry.num_rows - row)
            if num_rows <= 0 and pieces:
                buckets.append(Bucket(tuple(pieces), used))
                pieces, used = [], 0
                continue
            piece = Piece(entry, row, row + max(1, num_rows), used)
            pieces.append(piece)
            row = piece.stop
            used += -(-piece.num_bytes // ALIGNMENT) * ALIGNMENT
    if pieces:
        buckets.append(Bucket(tuple(pieces), used))
    lines = [f"{p.entry} {p.start} {p.stop} {i} {p.offset}" for i, bucket in enumerate(buckets) for p in bucket.pieces]
    return Plan(tuple(buckets), hashlib.sha256("\n".join(lines).encode()).hexdigest())


def pieces_of(named: Iterable[tuple[str, torch.Tensor]], plan: Plan) -> Iterator[list[torch.Tensor]]:
    """The tensors that fill each bucket, in the plan's order. Takes no more of `named` than the bucket needs.

    Raises `SyncError` when `named` is not what was planned.
    """
    stream = iter(named)
    name, tensor = "", torch.empty(0)
    for bucket in plan.buckets:
        sources: list[torch.Tensor] = []
        for piece in bucket.pieces:
            if piece.start == 0:
                name, tensor = _next_of(stream, piece.entry)
            sources.append(tensor if piece.is_whole else tensor[piece.start : piece.stop])
        yield sources
    for name, tensor in stream:
        if tensor.numel():
            raise SyncError(f"{name}: {kind_of(tensor)} was not there when the learner joined the engines")


def _next_of(stream: Iterator[tuple[str, torch.Tensor]], entry: Entry) -> tuple[str, torch.Tensor]:
    for name, tensor in stream:
        if Entry.of(name, tensor) == entry:
            return name, tensor
        if tensor.numel():
            raise SyncError(f"{name}: {kind_of(tensor)} comes where the learner planned {entry.name}")
    raise SyncError(f"{entry.name}: the learner's model has lost it since it joined the engines")


def shard_views(
    bucket: Bucket, buffer: torch.Tensor, shards: Iterable[tuple[str, Shard]]
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """`(targets, sources)`: for each of this rank's pieces of a parameter, the part of it that lies in the bucket, in
    the piece's memory and in the bucket's."""
    held: defaultdict[str, list[Shard]] = defaultdict(list)
    for name, shard in shards:
        held[name].append(shard)
    targets, sources = [], []
    for piece in bucket.pieces:
        for shard in held[piece.entry.name]:
            if part := _part_of(shard, piece, piece.view(buffer)):
                targets.append(part[0])
                sources.append(part[1])
    return targets, sources


def _part_of(shard: Shard, piece: Piece, source: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """`source` are the piece's rows, whole."""
    target = shard.tensor
    if target.dim():
        first = max(piece.start, shard.start[0])
        last = min(piece.stop, shard.start[0] + target.shape[0])
        if first >= last:
            return None
        target = target[first - shard.start[0] : last - shard.start[0]]
        source = source[first - piece.start : last - piece.start]
    for dim in range(1, target.dim()):
        source = source.narrow(dim, shard.start[dim], target.shape[dim])
    return target, source


def refuse_unplanned(manifest: Sequence[Entry], shards: Iterable[tuple[str, Shard]]) -> None:
    """Raises `SyncError` naming a shard of another type or shape than the manifest's, or not in it at all."""
    planned = {entry.name: entry for entry in manifest}
    for name, shard in shards:
        own = Entry(name, str(shard.tensor.dtype).removeprefix("torch."), tuple(shard.shape))
        sent = planned.get(name)
        if sent != own:
            theirs = sent.kind if sent else "nothing"
            raise SyncError(f"{name}: the engine holds {own.kind}, the learner sends {theirs}")


def copy_all(targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
    """One kernel for all tensors of a type that lie whole in memory, one each for the others (columns of a shard)."""
    dense: defaultdict[torch.dtype, tuple[list[torch.Tensor], list[torch.Tensor]]] = defaultdict(lambda: ([], []))
    for target, source in zip(targets, sources, strict=True):
        if target.is_contiguous() and source.is_contiguous():
            together = dense[target.dtype]
            together[0].append(target)
            together[1].append(source)
        else:
            target.copy_(source, non_blocking=True)
    for to, of in dense.values():
        torch._foreach_copy_(to, of, non_blocking=True)  # pyright: ignore[reportPrivateImportUsage]
