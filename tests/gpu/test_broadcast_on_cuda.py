"""What only a GPU's streams show of a broadcast: the next bucket packed while one is away, changes told unwaited."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from syncline.bridges.buckets import Entry, plan
from syncline.bridges.collective import Deadline
from syncline.bridges.pipeline import Sender
from syncline.bridges.sparse import Difference, difference, encode, write_changes

CUDA = torch.device("cuda")
LINK_CYCLES = 40_000_000
"""A bucket's way, in cycles of the GPU: about 20 ms, many times what packing it takes."""


@contextmanager
def never_waiting() -> Iterator[None]:
    """Raises where the host would wait for the GPU."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("share", [0.0, 0.01, 0.4])
def test_changes_are_told_and_written_without_the_host_but_for_their_number(share: float) -> None:
    old = torch.randint(0, 256, (64 << 20,), dtype=torch.uint8, device=CUDA)
    flips = torch.randint(1, 256, old.shape, dtype=torch.uint8, device=CUDA) * (
        torch.rand(old.shape, device=CUDA) < share
    )
    new, arrived = old ^ flips, old.clone()
    changes = difference(new, old)
    with never_waiting():
        write_changes(arrived, encode(new, changes))
    assert torch.equal(arrived, new)
    on_cpu = Difference(changes.told.cpu(), changes.num_told, changes.num_changed)
    assert torch.equal(encode(new, changes).cpu(), encode(new.cpu(), on_cpu))


class Link:
    """Stands for the group: as NCCL does, it sends on a stream of its own what was packed before."""

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()
        self.packed: list[torch.cuda.Event] = []
        self.sent: list[torch.cuda.Event] = []

    def broadcast(self, tensor: torch.Tensor) -> Any:
        del tensor
        packed, sent = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        packed.record()
        self._stream.wait_event(packed)
        with torch.cuda.stream(self._stream):
            torch.cuda._sleep(LINK_CYCLES)
            sent.record()
        self.packed.append(packed)
        self.sent.append(sent)
        return SimpleNamespace(is_completed=sent.query, wait=lambda: torch.cuda.current_stream().wait_event(sent))


def test_the_next_bucket_is_packed_while_the_last_one_is_away() -> None:
    named = {str(i): torch.randn(1 << 20, device=CUDA) for i in range(6)}
    planned = plan([Entry.of(name, tensor) for name, tensor in named.items()], bucket_bytes=4 << 20)
    sender, link = Sender(planned, CUDA), Link()
    sender.send(link, named.items(), deadline=Deadline.after(30), watch=lambda: None)  # type: ignore[arg-type]
    torch.cuda.synchronize()
    for bucket in range(len(planned.buckets) - 1):
        left = link.packed[bucket + 1].elapsed_time(link.sent[bucket])
        assert left > 0, f"bucket {bucket + 1} was packed {-left:.1f} ms after bucket {bucket} had arrived"
