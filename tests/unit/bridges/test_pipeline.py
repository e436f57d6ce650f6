"""A learner and its engines' workers, as threads over gloo: what is sent arrives, and nobody waits for good."""

from concurrent.futures import Future
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from syncline.bridges import pipeline
from syncline.bridges.buckets import Entry, plan
from syncline.bridges.collective import Deadline, Group, Seat, in_thread, listen, say_last
from syncline.bridges.manifest import Shard
from syncline.bridges.pipeline import Receiver, Sender
from syncline.bridges.sparse import SparseSender
from syncline.errors import EngineError, SyncError

CPU = torch.device("cpu")
BUCKET_BYTES = 64
SECONDS = 20.0


def nobody() -> None:
    """Nobody is known to be gone."""


def model(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "a": torch.randn(6, 4, generator=generator),
        "b": torch.randn(3, generator=generator).bfloat16(),
        "c": torch.randn(2, 3, 4, generator=generator),
    }


def planned(named: dict[str, torch.Tensor]) -> Any:
    return plan([Entry.of(name, tensor) for name, tensor in named.items()], bucket_bytes=BUCKET_BYTES)


class Parties:
    """One learner and `num_workers` workers that hold halves of `a`, by columns, and whole copies of the others."""

    def __init__(
        self, num_workers: int = 2, *, sender: type[Sender] = Sender, receiver: type[Receiver] = Receiver
    ) -> None:
        store, port = listen("127.0.0.1", timeout_seconds=SECONDS)
        seats = [Seat("127.0.0.1", port, rank, 1 + num_workers, "g") for rank in range(1 + num_workers)]
        deadline = Deadline.after(SECONDS)
        joining = [in_thread(lambda s=seat: Group.join(s, CPU, deadline=deadline)) for seat in seats[1:]]
        self.learner = Group.host(seats[0], CPU, store=store, deadline=deadline, watch=nobody)
        like = model(0)
        self.sender: Any = sender(planned(like), CPU)
        self.groups = [future.result(SECONDS) for future in joining]
        self.held = [self._shards(rank) for rank in range(num_workers)]
        self.receivers = [receiver(planned(like), list(shards.items()), CPU) for shards in self.held]

    @staticmethod
    def _shards(rank: int) -> dict[str, Shard]:
        zeros = {name: torch.zeros_like(tensor) for name, tensor in model(0).items()}
        shards = {name: Shard(tensor, tuple(tensor.shape), (0,) * tensor.dim()) for name, tensor in zeros.items()}
        return shards | {"a": Shard(zeros["a"][:, :2].contiguous(), (6, 4), (0, 2 * rank))}

    def close(self) -> None:
        """The learner first: what the workers wait for then ends."""
        for group in (self.learner, *self.groups):
            group.leave("the test is over")

    def receive(self, *, seconds: float = SECONDS) -> list[Future[None]]:
        return [
            in_thread(lambda r=receiver, g=group: r.receive(g, deadline=Deadline.after(seconds)))
            for receiver, group in zip(self.receivers, self.groups, strict=True)
        ]


def test_every_version_arrives_on_every_worker_and_leaves_the_learners_tensors_alone() -> None:
    parties = Parties()
    assert len(parties.sender.plan.buckets) >= 4, "the two buffers must take turns"
    for seed in (1, 2, 3):
        sent = model(seed)
        receiving = parties.receive()
        parties.sender.send(parties.learner, sent.items(), deadline=Deadline.after(SECONDS), watch=nobody)
        for future in receiving:
            future.result(SECONDS)
        for rank, shards in enumerate(parties.held):
            assert torch.equal(shards["a"].tensor, sent["a"][:, 2 * rank : 2 * rank + 2])
            assert torch.equal(shards["b"].tensor, sent["b"])
            assert torch.equal(shards["c"].tensor, sent["c"])
        assert all(torch.equal(tensor, model(seed)[name]) for name, tensor in sent.items())
    parties.close()


def test_a_learner_that_stops_sending_is_missed_at_the_deadline() -> None:
    parties = Parties(num_workers=1)
    [receiving] = parties.receive(seconds=0.3)
    with pytest.raises(SyncError, match=r"bucket 1 of \d+: not done after 0.3 s"):
        receiving.result(SECONDS)
    parties.close()


def test_a_learner_that_leaves_says_why_and_no_worker_waits_for_the_deadline() -> None:
    parties = Parties()
    receiving = parties.receive()
    parties.learner.leave("the optimizer failed")
    for future in receiving:
        with pytest.raises(SyncError, match="the learner left: the optimizer failed"):
            future.result(SECONDS / 2)


def test_an_engine_known_to_be_gone_ends_the_sending() -> None:
    """Its answer came, a fault, so nobody will take what is sent."""
    parties = Parties(num_workers=1)

    def watch() -> None:
        raise EngineError("engine a is gone")

    large = {name: torch.zeros(1 << 12, 1 << 12) for name in ("x", "y", "z")}
    sender = Sender(planned(large), CPU)
    with pytest.raises(EngineError, match="engine a is gone"):
        sender.send(parties.learner, large.items(), deadline=Deadline.after(SECONDS), watch=watch)
    parties.close()


def test_parties_that_never_come_are_waited_for_no_longer_than_the_deadline() -> None:
    store, port = listen("127.0.0.1", timeout_seconds=1)
    with pytest.raises(SyncError, match="connecting 2 parties"):
        Group.host(Seat("127.0.0.1", port, 0, 2, "g"), CPU, store=store, deadline=Deadline.after(0.3), watch=nobody)


def test_a_worker_that_joins_hears_that_the_learner_gave_up() -> None:
    """A third party never came, and the learner knows sooner than the deadline why."""
    store, port = listen("127.0.0.1", timeout_seconds=SECONDS)
    seat = Seat("127.0.0.1", port, 1, 3, "g")
    joining = in_thread(lambda: Group.join(seat, CPU, deadline=Deadline.after(SECONDS)))
    say_last(store, "engine b has no memory")
    with pytest.raises(SyncError, match="the learner left: engine b has no memory"):
        joining.result(SECONDS / 2)


def test_a_worker_whose_learner_is_not_there_gives_up_at_the_deadline() -> None:
    store, port = listen("127.0.0.1", timeout_seconds=1)
    del store
    with pytest.raises(SyncError, match=f"nobody at 127.0.0.1:{port}"):
        Group.join(Seat("127.0.0.1", port, 1, 2, "g"), CPU, deadline=Deadline.after(0.5))


def test_the_store_listens_on_the_given_address_alone() -> None:
    _, port = listen("127.0.0.1", timeout_seconds=1)
    tables = Path("/proc/net/tcp").read_text() + Path("/proc/net/tcp6").read_text()
    rows = [line.split() for line in tables.splitlines()]
    listening = [row[1] for row in rows if row[3] == "0A" and row[1].endswith(f":{port:04X}")]
    assert listening == [f"0100007F:{port:04X}"]


class Traffic:
    """Stands for the group and for torch's work: a bucket is on its way until the next one has been started."""

    def __init__(self, num_buckets: int) -> None:
        self.log: list[str] = []
        self._num_buckets = num_buckets
        self._num_started = 0

    def broadcast(self, tensor: torch.Tensor) -> Any:
        if tensor.dtype != torch.uint8:  # a header
            return SimpleNamespace(is_completed=lambda: True, wait=lambda: None)
        bucket, self._num_started = self._num_started, self._num_started + 1
        self.log.append(f"send {bucket}")
        return SimpleNamespace(
            is_completed=lambda: self._num_started > min(bucket + 1, self._num_buckets - 1),
            wait=lambda: self.log.append(f"wait {bucket}"),
        )


def test_a_bucket_is_packed_while_the_last_one_is_under_way() -> None:
    """On a CPU: a sender that waited for bucket k before it packs k + 1 would wait until the deadline."""
    sent = model(1)
    sender = Sender(planned(sent), CPU)
    traffic: Any = Traffic(len(sender.plan.buckets))
    sender.send(traffic, sent.items(), deadline=Deadline.after(2), watch=nobody)


@pytest.mark.parametrize("end", [Sender, SparseSender])
def test_a_gpu_is_told_to_pack_a_bucket_before_it_is_told_to_wait_for_the_last_one(
    end: type[Sender], monkeypatch
) -> None:
    """In the order in which one stream is given its work, NCCL's own stream beside it: `wait` k holds the stream until
    bucket k is away, so bucket k + 1 must be packed before, and k + 2, which takes k's buffer, after."""
    sent = model(1)
    sender = end(planned(sent), CPU)
    monkeypatch.setattr(sender, "_stream", object())
    monkeypatch.setattr(sender, "_on_stream", nullcontext)
    monkeypatch.setattr(sender, "_finish", lambda deadline, watch: None)
    num_buckets = len(sender.plan.buckets)
    traffic: Any = Traffic(num_buckets)
    copy = pipeline.copy_all

    def pack(*tensors: Any) -> None:
        traffic.log.append(f"pack {sum('pack' in line for line in traffic.log)}")
        copy(*tensors)

    monkeypatch.setattr(pipeline, "copy_all", pack)
    sender.send(traffic, sent.items(), deadline=Deadline.after(2), watch=nobody)
    at = {line: i for i, line in reversed(list(enumerate(traffic.log)))}
    for bucket in range(num_buckets - 2):
        assert at[f"pack {bucket + 1}"] < at[f"wait {bucket}"] < at[f"pack {bucket + 2}"]


def test_a_broadcast_runs_beside_the_stream_it_is_started_on() -> None:
    """torch queues a collective that is not asynchronous on the current stream itself: packing would wait for it."""
    parties = Parties(num_workers=1)
    assert parties.learner._from_learner.asyncOp is True
    parties.close()
