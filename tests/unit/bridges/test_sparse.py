"""Changed values alone: bits in, the same bits out, in as few bytes as promised, and whole whenever there is doubt."""

from collections.abc import Iterator

import pytest
import torch
from fake_engine import FakeEngine
from hypothesis import given
from hypothesis import strategies as st
from test_broadcast import assert_serves, bridge_to, make_model, named
from test_pipeline import SECONDS, Parties, model, nobody

from syncline.bridges import sparse
from syncline.bridges.collective import Deadline
from syncline.bridges.sparse import (
    BLOCK_WORDS,
    Difference,
    SparseReceiver,
    SparseSender,
    difference,
    encode,
    write_changes,
)
from syncline.errors import EngineError, SyncError

NAN_WITH_PAYLOAD, MINUS_ZERO = 0x7FA5, -0x8000


def bucket_of(words: torch.Tensor) -> torch.Tensor:
    return words.to(torch.int16).view(torch.uint8)


def sent_over(new: torch.Tensor, old: torch.Tensor) -> Difference:
    """Checks that what is told of `new` turns `old` into it, bit for bit."""
    changes = difference(new, old)
    encoded = encode(new, changes)
    assert encoded.numel() == 4 * changes.num_told
    arrived = old.clone()
    write_changes(arrived, encoded)
    assert torch.equal(arrived, new)
    return changes


def test_the_encoding_worked_by_hand() -> None:
    """Words 1 and 5 of 8 changed: the first is told too, because it begins the block."""
    old, new = torch.arange(8), torch.arange(8)
    new[1], new[5] = NAN_WITH_PAYLOAD, MINUS_ZERO
    changes = difference(bucket_of(new), bucket_of(old))
    assert (changes.num_told, changes.num_changed) == (3, 2)
    encoded = encode(bucket_of(new), changes).view(torch.int16)
    assert encoded.tolist() == [0, 1, 5, 0, NAN_WITH_PAYLOAD, MINUS_ZERO]


@given(st.integers(8, 3 * BLOCK_WORDS), st.floats(0, 1), st.integers(0, 1000))
def test_whatever_changes_arrives_bit_for_bit(size: int, share: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    old = torch.randint(-(1 << 15), 1 << 15, (size,), generator=generator)
    flips = torch.randint(1, 1 << 15, (size,), generator=generator) * (torch.rand(size, generator=generator) < share)
    changes = sent_over(bucket_of(old ^ flips), bucket_of(old))
    assert changes.num_changed == int((flips != 0).sum())
    assert changes.num_told <= changes.num_changed + -(-size // BLOCK_WORDS)


@pytest.mark.parametrize("slice_size", [1, 2, 1 << 20])
def test_changes_at_the_borders_of_blocks_and_slices(slice_size: int, monkeypatch) -> None:
    """The third block has no change of its own, the last ends in the middle."""
    monkeypatch.setattr(sparse, "_SLICE", slice_size)
    old = torch.zeros(3 * BLOCK_WORDS + 10)
    new = old.clone()
    for place in (0, BLOCK_WORDS - 1, BLOCK_WORDS, 2 * BLOCK_WORDS - 1, 3 * BLOCK_WORDS + 9):
        new[place] = 1 + place % 7
    assert sent_over(bucket_of(new), bucket_of(old))[1:] == (4 + 3, 5)
    assert sent_over(bucket_of(old), bucket_of(old)).num_changed == 0


def test_zero_minus_zero_and_nans_are_told_apart_by_their_bits() -> None:
    old = torch.tensor([0.0, -0.0, float("nan"), 1.0] * 2, dtype=torch.bfloat16)
    new = torch.tensor([-0.0, -0.0, float("nan"), 1.0] * 2, dtype=torch.bfloat16)
    new.view(torch.int16)[6] = NAN_WITH_PAYLOAD
    changes = sent_over(new.view(torch.uint8), old.view(torch.uint8))
    assert changes.told.nonzero()[:, 0].tolist() == [0, 4, 6]


def test_changes_that_are_not_from_the_encoder_stay_inside_the_bucket() -> None:
    """A device would end the engine's process for an index beyond it."""
    bucket = torch.zeros(2 * 10, dtype=torch.uint8)
    write_changes(bucket, torch.tensor([0, 0, 0, -1, 3, 3, 3, 3], dtype=torch.int16).view(torch.uint8))
    write_changes(bucket, torch.tensor([5, 3], dtype=torch.int16).view(torch.uint8))


def assert_arrived(parties: Parties, sent: dict[str, torch.Tensor]) -> None:
    for rank, shards in enumerate(parties.held):
        expected = sent | {"a": sent["a"][:, 2 * rank : 2 * rank + 2].contiguous()}
        for name, tensor in expected.items():
            assert torch.equal(shards[name].tensor.view(torch.uint8), tensor.view(torch.uint8)), name


def send(parties: Parties, sent: dict[str, torch.Tensor]) -> None:
    receiving = parties.receive()
    parties.sender.send(parties.learner, sent.items(), deadline=Deadline.after(SECONDS), watch=nobody)
    for future in receiving:
        future.result(SECONDS)
    assert_arrived(parties, sent)


@pytest.fixture
def parties() -> Iterator[Parties]:
    parties = Parties(sender=SparseSender, receiver=SparseReceiver)
    yield parties
    parties.close()


def test_shards_of_every_type_follow_whatever_changes(parties: Parties) -> None:
    """Whole first; then a few bits of each type, none, all, and a few after a doubt. 8 header bytes a bucket."""
    whole = parties.sender.plan.num_bytes + 8 * len(parties.sender.plan.buckets)
    sent = model(1)
    send(parties, sent)
    assert (parties.sender.num_bytes, parties.sender.changed_fraction) == (whole, None)

    sent["a"][4, 3] = -0.0
    sent["b"].view(torch.int16)[1] = NAN_WITH_PAYLOAD
    sent["c"].view(torch.int16)[1, 2, 7] ^= 1
    send(parties, sent)
    num_words = (24 + 24) * 2 + 3
    assert parties.sender.changed_fraction == pytest.approx((2 + 1 + 1) / num_words)
    num_told = 4 + len(parties.sender.plan.buckets)
    assert parties.sender.num_bytes == 4 * num_told + 8 * len(parties.sender.plan.buckets)

    send(parties, sent)
    assert parties.sender.changed_fraction == 0

    sent = {name: ~tensor.view(torch.uint8) for name, tensor in sent.items()}
    sent = {name: tensor.view(model(1)[name].dtype).view(model(1)[name].shape) for name, tensor in sent.items()}
    send(parties, sent)
    assert (parties.sender.num_bytes, parties.sender.changed_fraction) == (whole, 1)

    parties.sender.forget()
    sent["a"][0, 0] = 1.0
    send(parties, sent)
    assert (parties.sender.num_bytes, parties.sender.changed_fraction) == (whole, None)


def test_after_a_send_that_broke_off_the_next_is_whole(parties: Parties) -> None:
    send(parties, model(1))
    with pytest.raises(SyncError, match="has lost it"):
        parties.sender.send(parties.learner, [], deadline=Deadline.after(SECONDS), watch=nobody)
    send(parties, model(1))
    assert parties.sender.changed_fraction is None


@pytest.mark.parametrize("count", [0, -2, 16, 1 << 40])
def test_a_header_that_cannot_be_is_refused_before_memory_is_taken_for_it(parties: Parties, count: int) -> None:
    receiving = parties.receive()
    assert parties.sender.plan.buckets[0].num_bytes == 64
    parties.learner.broadcast(torch.tensor([count])).wait()
    for future in receiving:
        with pytest.raises(SyncError, match=f"bucket 1 of [0-9]+: {count} changes announced for 64 bytes"):
            future.result(SECONDS)


@pytest.fixture
def engines() -> Iterator[list[FakeEngine]]:
    like = named(make_model(0))
    engines = [FakeEngine("engine a", like, num_workers=2), FakeEngine("engine b", like)]
    yield engines
    for engine in engines:
        engine.close()


def nudge(model: torch.nn.Module) -> None:
    """One value of each parameter."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.view(-1)[3] += 1


def test_engines_get_what_changed_and_the_whole_when_one_of_them_came_up_anew(engines: list[FakeEngine]) -> None:
    model, bridge = make_model(1), bridge_to(engines, sparse=True)
    bridge.attach(model)
    size = sum(p.nbytes for p in model.parameters())

    def publish(version: int) -> tuple[bool, bool]:
        """Whether few bytes moved, and whether the report knows what changed."""
        report = bridge.publish(model, policy_version=version)
        for engine in engines:
            assert_serves(engine, model, policy_version=version)
        return 0 < report.num_bytes < size / 2, report.changed_fraction is not None

    assert publish(0) == (False, False)
    nudge(model)
    assert publish(1) == (True, True)
    assert publish(2) == (False, False), "nothing moves"
    nudge(model)
    assert publish(3) == (True, True), "what was sent is still known"
    engines[1].restart()
    nudge(model)
    assert publish(4) == (False, False)
    nudge(model)
    assert publish(5) == (True, True)


def test_after_a_publish_that_failed_every_engine_gets_the_whole(engines: list[FakeEngine]) -> None:
    model, bridge = make_model(1), bridge_to(engines, sparse=True)
    bridge.attach(model)
    bridge.publish(model, policy_version=0)
    nudge(model)

    def die() -> None:
        raise EngineError("engine b broke off")

    engines[1].before_receive = die
    with pytest.raises(SyncError, match="engine b broke off"):
        bridge.publish(model, policy_version=1)
    engines[1].before_receive = lambda: None
    assert bridge.publish(model, policy_version=1).changed_fraction is None
    for engine in engines:
        assert_serves(engine, model, policy_version=1)


def test_a_change_left_out_on_the_way_is_caught_by_its_name_and_made_good_by_the_whole(
    engines: list[FakeEngine], monkeypatch
) -> None:
    model, bridge = make_model(1), bridge_to(engines, sparse=True, bucket_bytes=1 << 20)
    bridge.attach(model)
    bridge.publish(model, policy_version=0)
    nudge(model)

    def truncated(new: torch.Tensor, changes: Difference) -> torch.Tensor:
        """The header says as many, and the last place repeats the one before it."""
        places, values = encode(new, changes).view(torch.int16).clone().chunk(2)
        places[-1], values[-1] = places[-2], values[-2]
        return torch.cat((places, values)).view(torch.uint8)

    with monkeypatch.context() as spoilt:
        spoilt.setattr(sparse, "encode", truncated)
        with pytest.raises(SyncError, match=r"engine a holds no version, .*\n1\.weight: the learner"):
            bridge.publish(model, policy_version=1)
    assert all(engine.calls[-1] == "pause abort" for engine in engines)
    assert bridge.publish(model, policy_version=1).changed_fraction is None
    for engine in engines:
        assert_serves(engine, model, policy_version=1)
