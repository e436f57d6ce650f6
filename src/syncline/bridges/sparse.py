"""A broadcast's changed values alone: with bf16 weights and the small steps of reinforcement learning few change.

The learner keeps the bits it last published (as many bytes as the model has, on its GPU; of a sharded learner on rank
0), compares each bucket with them as it packs it, and sends what differs when that is less than the bucket. Engines
keep nothing: they pack their own memory into the bucket, write the changes into it, and unpack it as they would the
whole; what a rank does not hold is never read out. So shards, fused layers and every type work alike, and nothing is
ever added or rounded: bits are replaced.

A header goes before each bucket with the number of changes, or `WHOLE`. It is the one number that either host reads.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch

from syncline.bridges.buckets import Bucket, Plan, copy_all
from syncline.bridges.collective import Deadline, Group, Watch
from syncline.bridges.manifest import Shard
from syncline.bridges.pipeline import Receiver, Sender
from syncline.errors import SyncError

WORD_BYTES = 2
BLOCK_WORDS = 1 << 16
CHANGE_BYTES = 4
WHOLE = -1
_SLICE = 1 << 20
"""Changes written at once: their index takes 8 bytes each."""


class Difference(NamedTuple):
    """Between two states of a bucket. `told` marks the words to send `[words]`: those that changed, and the first of
    each block."""

    told: torch.Tensor
    num_told: int
    num_changed: int


def difference(new: torch.Tensor, old: torch.Tensor) -> Difference:
    """Of two buckets of one size, uint8 `[bytes]`, compared as words of 16 bits. The host waits once."""
    told = _words(new) != _words(old)
    first = told[::BLOCK_WORDS]
    num_changed, num_unchanged_firsts = torch.stack((told.sum(), first.numel() - first.sum())).tolist()
    first.fill_(True)
    return Difference(told, num_changed + num_unchanged_firsts, num_changed)


def encode(new: torch.Tensor, changes: Difference) -> torch.Tensor:
    """uint8 `[4 × num_told]`: each told word's place in its block of 65,536, then each one's bits in `new`.

    Block numbers need not be sent: the first word of each block is always told, so a place 0 begins the next block.
    Against 32-bit positions this saves a third; 8-bit places would need a told word in every 256, which at the 1 % of
    words that a step changes is as much again; a bitmap costs a sixteenth of the bucket, more than all this up to 6 %.
    """
    positions = torch.nonzero_static(changes.told, size=changes.num_told)[:, 0]
    return torch.cat((positions.to(torch.int16), _words(new)[positions])).view(torch.uint8)


def write_changes(bucket: torch.Tensor, encoded: torch.Tensor) -> None:
    """Writes what `encode` says into `bucket`, uint8 `[bytes]`, in place. The host does not wait, so what is not from
    `encode` is not refused here: it is written somewhere in the bucket, and the digest shows it."""
    words, (places, values) = _words(bucket), encoded.view(torch.int16).chunk(2)
    block = torch.full((1,), -1, dtype=torch.int64, device=bucket.device)
    for place, value in zip(places.split(_SLICE), values.split(_SLICE), strict=True):
        blocks = (place == 0).cumsum(0) + block
        positions = blocks * BLOCK_WORDS + (place.to(torch.int64) & (BLOCK_WORDS - 1))
        words[positions.clamp_(0, len(words) - 1)] = value
        block = blocks[-1:]


def _words(bucket: torch.Tensor) -> torch.Tensor:
    """Compared as integers: -0.0 is not 0.0, and a NaN is itself."""
    return bucket.view(torch.int16)


class _Both:
    """Torch's work on a header and on what follows it, as one; holds the tensors until somebody waited."""

    def __init__(self, *sent: tuple[Any, torch.Tensor]) -> None:
        self._sent = sent

    def is_completed(self) -> bool:
        return all(work.is_completed() for work, _ in self._sent)

    def wait(self) -> None:
        for work, _ in self._sent:
            work.wait()
        self._sent = ()


class SparseSender(Sender):
    """The learner's end. `forget` before a `send` to engines that may hold other bits than were last sent."""

    max_queued = 0  # the host reads a count of what is queued, and would wait there for a dead engine

    def __init__(self, plan: Plan, device: torch.device) -> None:
        super().__init__(plan, device)
        try:
            self._last = [torch.empty(bucket.num_bytes, dtype=torch.uint8, device=device) for bucket in plan.buckets]
        except torch.OutOfMemoryError as error:
            raise SyncError(
                f"no memory to keep the {plan.num_bytes} bytes last published on {device}; set bridge.sparse to false"
            ) from error
        self._gaps = [_gaps(bucket, self._buffer(i)) for i, bucket in enumerate(plan.buckets)]
        self._num_words = sum(p.num_bytes for bucket in plan.buckets for p in bucket.pieces) / WORD_BYTES
        self._is_known = self._from_known = False
        self._num_changed = self._num_bytes = 0

    def forget(self) -> None:
        self._is_known = False

    @property
    def num_bytes(self) -> int:
        return self._num_bytes

    @property
    def changed_fraction(self) -> float | None:
        return self._num_changed / self._num_words if self._from_known else None

    def send(self, group: Group, named: Any, *, deadline: Deadline, watch: Watch) -> None:
        self._from_known, self._is_known = self._is_known, False
        self._num_changed = self._num_bytes = 0
        super().send(group, named, deadline=deadline, watch=watch)
        self._is_known = True

    def _start(self, group: Group, bucket: int, deadline: Deadline, watch: Watch) -> Any:
        new, last = self._buffer(bucket)[: self.plan.buckets[bucket].num_bytes], self._last[bucket]
        for gap in self._gaps[bucket]:
            gap.zero_()
        content, count = new, WHOLE
        if self._from_known:
            changes = difference(new, last)
            self._num_changed += changes.num_changed
            if changes.num_told * CHANGE_BYTES < new.numel():
                content, count = encode(new, changes), changes.num_told
        header = torch.full((1,), count, dtype=torch.int64, device=new.device)
        sent = _Both((group.broadcast(header), header), (group.broadcast(content), content))
        self._num_bytes += header.nbytes + content.nbytes
        last.copy_(new) if count == WHOLE else write_changes(last, content)
        return sent


def _gaps(bucket: Bucket, buffer: torch.Tensor) -> Sequence[torch.Tensor]:
    """What alignment leaves between pieces: nobody packs it, and it must not count as changed."""
    ends = [piece.offset + piece.num_bytes for piece in bucket.pieces]
    starts = [*(piece.offset for piece in bucket.pieces[1:]), bucket.num_bytes]
    return [buffer[end:start] for end, start in zip(ends, starts, strict=True) if end < start]


class SparseReceiver(Receiver):
    """An engine worker's end."""

    max_queued = 0

    def __init__(self, plan: Plan, shards: Sequence[tuple[str, Shard]], device: torch.device) -> None:
        super().__init__(plan, shards, device)
        self._changes: dict[int, torch.Tensor] = {}
        """What comes of a bucket that does not come whole."""
        self._reading = torch.cuda.Stream(device) if self._stream else None
        """Apart, so that reading a header does not wait for the last bucket's unpacking."""

    def receive(self, group: Group, *, deadline: Deadline) -> None:
        self._changes.clear()
        try:
            super().receive(group, deadline=deadline)
        except torch.OutOfMemoryError as error:
            raise SyncError(
                "no memory for a bucket's changes; lower bridge.bucket_bytes or engine.gpu_memory_utilization"
            ) from error

    def _start(self, group: Group, bucket: int, deadline: Deadline, watch: Watch) -> Any:
        count = self._count(group, bucket, deadline, watch)
        if count == WHOLE:
            return super()._start(group, bucket, deadline, watch)
        content = torch.empty(count * CHANGE_BYTES, dtype=torch.uint8, device=self._buffer(bucket).device)
        self._changes[bucket] = content
        return group.broadcast(content)

    def _count(self, group: Group, bucket: int, deadline: Deadline, watch: Watch) -> int:
        header = torch.empty(1, dtype=torch.int64, device=self._buffer(bucket).device)
        work, doing = group.broadcast(header), self._doing(bucket)
        deadline.wait(work.is_completed, doing=doing, watch=watch)
        with torch.cuda.stream(self._reading) if self._reading else nullcontext():
            self._order_after(work, doing, watch)
            count = int(header)
        num_bytes = self.plan.buckets[bucket].num_bytes
        if count != WHOLE and not 0 < count * CHANGE_BYTES < num_bytes:
            raise SyncError(f"{doing}: {count} changes announced for {num_bytes} bytes")
        return count

    def _unpack(self, works: list[Any], bucket: int, deadline: Deadline, watch: Watch) -> None:
        content = self._changes.pop(bucket, None)
        if content is None:
            return super()._unpack(works, bucket, deadline, watch)
        own, places = self._parts[bucket]
        copy_all(places, own)
        self._settle(works, bucket, deadline, watch)
        write_changes(self._buffer(bucket)[: self.plan.buckets[bucket].num_bytes], content)
        copy_all(own, places)
