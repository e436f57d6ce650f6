"""Both ends of a broadcast: buckets packed while the last one is sent, unpacked while the next one comes.

Two buffers take turns. The sender packs bucket k+1 while k is under way, and waits for k before it packs k+2 into the
same buffer; the receiver asks for k+1 before it unpacks k. On GPUs all of it is queued on one stream beside NCCL's
own, so Python runs ahead and waits once, at the end; on CPUs it waits for each bucket. Every wait has a deadline.
"""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from syncline.bridges.buckets import Plan, copy_all, pieces_of, shard_views
from syncline.bridges.collective import Deadline, Group, Watch
from syncline.bridges.manifest import Shard
from syncline.errors import SyncError

MAX_QUEUED = 16
"""Buckets Python may be ahead of a GPU: a full launch queue would block where no deadline is looked at."""


class Pipeline:
    """The buffers, the stream and the waiting that both ends have alike."""

    max_queued = MAX_QUEUED

    def __init__(self, plan: Plan, device: torch.device) -> None:
        self.plan = plan
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        try:
            self._buffers = [torch.empty(plan.capacity, dtype=torch.uint8, device=device) for _ in range(2)]
        except torch.OutOfMemoryError as error:
            raise SyncError(
                f"no memory for two buckets of {plan.capacity} bytes on {device}; lower bridge.bucket_bytes or "
                "engine.gpu_memory_utilization"
            ) from error

    def _buffer(self, bucket: int) -> torch.Tensor:
        return self._buffers[bucket % 2]

    def _start(self, group: Group, bucket: int, deadline: Deadline, watch: Watch) -> Any:
        del deadline, watch
        return group.broadcast(self._buffer(bucket)[: self.plan.buckets[bucket].num_bytes])

    def _on_stream(self) -> AbstractContextManager[Any]:
        if self._stream is None:
            return nullcontext()
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        return torch.cuda.stream(self._stream)

    def _settle(self, works: list[Any], bucket: int, deadline: Deadline, watch: Watch) -> None:
        """What is queued or done next comes after the bucket's transfer. On a CPU that means waiting here."""
        if bucket < 0:
            return
        doing = self._doing(bucket)
        if self._stream is None:
            deadline.wait(works[bucket].is_completed, doing=doing, watch=watch)
        elif bucket >= self.max_queued:
            deadline.wait(works[bucket - self.max_queued].is_completed, doing=doing, watch=watch)
        self._order_after(works[bucket], doing, watch)

    def _doing(self, bucket: int) -> str:
        return f"bucket {bucket + 1} of {len(self.plan.buckets)}"

    @staticmethod
    def _order_after(work: Any, doing: str, watch: Watch) -> None:
        """A GPU's current stream goes on after `work`; on a CPU, where it is done, its fault is raised."""
        try:
            work.wait()
        except RuntimeError as error:
            watch()
            raise SyncError(f"{doing}: {error}") from error

    def _finish(self, deadline: Deadline, watch: Watch) -> None:
        """Waits for a GPU to have done all that was queued."""
        if self._stream is None:
            return
        done = torch.cuda.Event()
        done.record(self._stream)
        try:
            deadline.wait(done.query, doing=f"{len(self.plan.buckets)} buckets", watch=watch)
        except RuntimeError as error:
            raise SyncError(f"the GPU failed at a broadcast: {error}") from error


class Sender(Pipeline):
    """The learner's end."""

    def __init__(self, plan: Plan, device: torch.device) -> None:
        super().__init__(plan, device)
        self._places = [
            [piece.view(self._buffer(i)) for piece in bucket.pieces] for i, bucket in enumerate(plan.buckets)
        ]

    @property
    def num_bytes(self) -> int:
        """What the last `send` moved."""
        return self.plan.num_bytes

    @property
    def changed_fraction(self) -> float | None:
        """Of all 16-bit words, those that the last `send` found changed; `None`: it did not look."""
        return None

    def forget(self) -> None:
        """The engines may hold other bits than were last sent."""

    @torch.no_grad()
    def send(
        self, group: Group, named: Iterable[tuple[str, torch.Tensor]], *, deadline: Deadline, watch: Watch
    ) -> None:
        """`named` is read as the buckets go, so of tensors made for it no more than a bucket's worth exists at once.

        Raises `SyncError`, and whatever `watch` raises.
        """
        works: list[Any] = []
        with self._on_stream():
            for i, sources in enumerate(pieces_of(named, self.plan)):
                self._settle(works, i - 2, deadline, watch)
                copy_all(self._places[i], sources)
                works.append(self._start(group, i, deadline, watch))
            for last in range(max(0, len(works) - 2), len(works)):
                self._settle(works, last, deadline, watch)
        self._finish(deadline, watch)


class Receiver(Pipeline):
    """An engine worker's end: what arrives goes straight into the memory that the forward pass reads."""

    def __init__(self, plan: Plan, shards: Sequence[tuple[str, Shard]], device: torch.device) -> None:
        super().__init__(plan, device)
        self._parts = [shard_views(bucket, self._buffer(i), shards) for i, bucket in enumerate(plan.buckets)]

    @torch.inference_mode()
    def receive(self, group: Group, *, deadline: Deadline) -> None:
        """Raises `SyncError` when the learner stops or leaves; the memory is then of no version."""
        works: list[Any] = []
        watch = group.refuse_if_left
        with self._on_stream():
            for i in range(len(self.plan.buckets)):
                works.append(self._start(group, i, deadline, watch))
                self._unpack(works, i - 1, deadline, watch)
            self._unpack(works, len(works) - 1, deadline, watch)
        self._finish(deadline, watch)

    def _unpack(self, works: list[Any], bucket: int, deadline: Deadline, watch: Watch) -> None:
        if bucket >= 0:
            self._settle(works, bucket, deadline, watch)
            copy_all(*self._parts[bucket])
