"""The plan of buckets: every element once, whatever the shapes, the bucket's size and the receiver's shards."""

from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from syncline.bridges.buckets import (
    ALIGNMENT,
    Entry,
    Piece,
    copy_all,
    pieces_of,
    plan,
    refuse_unplanned,
    shard_views,
)
from syncline.bridges.manifest import Shard
from syncline.errors import SyncError

SHAPES = st.lists(st.integers(0, 7), max_size=3).map(tuple)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.int8])


@st.composite
def models(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    kinds = draw(st.lists(st.tuples(SHAPES, DTYPES), min_size=1, max_size=6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    return {
        f"p{i}": torch.randint(-100, 100, shape, generator=generator).to(dtype)
        for i, (shape, dtype) in enumerate(kinds)
    }


def manifest(model: dict[str, torch.Tensor]) -> list[Entry]:
    return [Entry.of(name, tensor) for name, tensor in model.items()]


def through_buckets(model: dict[str, torch.Tensor], shards: list[tuple[str, Shard]], *, bucket_bytes: int) -> None:
    """Packs the model bucket by bucket, as the learner does, and unpacks the shards' parts, as an engine does."""
    planned = plan(manifest(model), bucket_bytes=bucket_bytes)
    for bucket, sources in zip(planned.buckets, pieces_of(model.items(), planned), strict=True):
        buffer = torch.full((planned.capacity,), 0x55, dtype=torch.uint8)
        copy_all([piece.view(buffer) for piece in bucket.pieces], sources)
        copy_all(*shard_views(bucket, buffer, shards))


def cut(tensor: torch.Tensor, dim: int, ranks: int) -> list[Shard]:
    """The tensor's shards along `dim`, each in memory of its own."""
    starts = [tensor.shape[dim] * rank // ranks for rank in range(ranks + 1)]
    shards = []
    for first, last in pairwise(starts):
        start = [0] * tensor.dim()
        start[dim] = first
        piece = torch.zeros_like(tensor.narrow(dim, first, last - first))
        shards.append(Shard(piece, tuple(tensor.shape), tuple(start)))
    return shards


@given(models(), st.integers(1, 300), st.integers(1, 3), st.integers(0, 2))
def test_whatever_is_packed_arrives_once_on_every_shard(
    model: dict[str, torch.Tensor], bucket_bytes: int, ranks: int, dim: int
) -> None:
    def shards(tensor: torch.Tensor) -> list[Shard]:
        if tensor.dim() == 0:
            return [Shard(torch.zeros_like(tensor), (), ())] * ranks
        return cut(tensor, dim % tensor.dim(), ranks)

    all_shards = {name: shards(tensor) for name, tensor in model.items()}
    for rank in range(ranks):
        through_buckets(model, [(name, cuts[rank]) for name, cuts in all_shards.items()], bucket_bytes=bucket_bytes)
    for name, tensor in model.items():
        arrived = [shard.tensor for shard in all_shards[name]]
        assert torch.equal(arrived[0] if tensor.dim() == 0 else torch.cat(arrived, dim % tensor.dim()), tensor)


@given(st.integers(1, 300))
def test_a_rank_that_holds_several_pieces_of_a_parameter_gets_them_all(bucket_bytes: int) -> None:
    """A layer the checkpoint fuses, split over ranks: rows 1 to 2 and 5 to 7 of eight, and nothing else."""
    model = {"qkv": torch.arange(32.0).view(8, 4)}
    pieces = [Shard(torch.zeros(2, 4), (8, 4), (1, 0)), Shard(torch.zeros(3, 4), (8, 4), (5, 0))]
    through_buckets(model, [("qkv", piece) for piece in pieces], bucket_bytes=bucket_bytes)
    assert torch.equal(pieces[0].tensor, model["qkv"][1:3])
    assert torch.equal(pieces[1].tensor, model["qkv"][5:8])


@given(models(), st.integers(1, 300))
def test_every_row_has_one_place_and_no_two_overlap(model: dict[str, torch.Tensor], bucket_bytes: int) -> None:
    planned = plan(manifest(model), bucket_bytes=bucket_bytes)
    rows: dict[str, list[int]] = {}
    for bucket in planned.buckets:
        end = 0
        for piece in bucket.pieces:
            assert piece.offset >= end
            assert piece.offset % ALIGNMENT == 0
            end = piece.offset + piece.num_bytes
            rows.setdefault(piece.entry.name, []).extend(range(piece.start, piece.stop))
        assert end <= bucket.num_bytes <= planned.capacity
    assert rows == {e.name: list(range(e.num_rows)) for e in manifest(model) if e.num_rows and e.row_bytes}


def test_a_parameter_larger_than_a_bucket_goes_on_in_the_next_and_a_row_is_never_cut() -> None:
    """Rows of 40 bytes, buckets of 100: two rows fit, at 0 and (aligned with the piece) the next parameter at 80."""
    large, small = Entry("large", "float32", (5, 10)), Entry("small", "int8", (3,))
    planned = plan([large, small], bucket_bytes=100)
    assert [bucket.pieces for bucket in planned.buckets] == [
        (Piece(large, 0, 2, 0),),
        (Piece(large, 2, 4, 0),),
        (Piece(large, 4, 5, 0), Piece(small, 0, 3, 48)),
    ]
    assert [bucket.num_bytes for bucket in planned.buckets] == [80, 80, 64]
    assert plan([large], bucket_bytes=1).capacity == 48, "a row and its alignment"


def test_two_sides_that_would_cut_differently_have_different_digests() -> None:
    a, b = Entry("a", "float32", (8, 8)), Entry("b", "float32", (8, 8))
    reference = plan([a, b], bucket_bytes=128).digest
    assert plan([a, b], bucket_bytes=128).digest == reference
    others: Sequence[tuple[list[Entry], int]] = [
        ([b, a], 128),
        ([a, b], 256),
        ([a], 128),
        ([a, Entry("b", "bfloat16", (8, 16))], 128),
    ]
    assert reference not in [plan(entries, bucket_bytes=size).digest for entries, size in others]


def test_a_learner_that_changed_since_it_joined_is_refused_by_parameter_name() -> None:
    model = {"a": torch.zeros(4), "b": torch.zeros(4)}
    planned = plan(manifest(model), bucket_bytes=8)
    with pytest.raises(SyncError, match=r"b: float32\[4\] comes where the learner planned a"):
        list(pieces_of({"b": torch.zeros(4), "a": torch.zeros(4)}.items(), planned))
    with pytest.raises(SyncError, match="b: the learner's model has lost it"):
        list(pieces_of({"a": torch.zeros(4)}.items(), planned))
    with pytest.raises(SyncError, match=r"c: float32\[1\] was not there"):
        list(pieces_of((model | {"c": torch.zeros(1)}).items(), planned))


def test_an_engine_of_another_model_is_refused_by_parameter_name() -> None:
    sent = [Entry("a", "float32", (4, 2))]
    half = Shard(torch.zeros(2, 2), (4, 2), (2, 0))
    refuse_unplanned(sent, [("a", half)])
    with pytest.raises(SyncError, match=r"a: the engine holds bfloat16\[4, 2\], the learner sends float32\[4, 2\]"):
        refuse_unplanned(sent, [("a", Shard(half.tensor.bfloat16(), (4, 2), (2, 0)))])
    with pytest.raises(SyncError, match=r"b: the engine holds float32\[4, 2\], the learner sends nothing"):
        refuse_unplanned(sent, [("b", half)])


def test_no_more_of_the_model_is_read_than_the_bucket_needs() -> None:
    """Merged adapters are made as they are read, so reading ahead would hold a second model."""
    read: list[str] = []

    def export():
        for name in "abcd":
            read.append(name)
            yield name, torch.zeros(4)

    planned = plan([Entry(name, "float32", (4,)) for name in "abcd"], bucket_bytes=32)
    sources = pieces_of(export(), planned)
    next(sources)
    assert read == ["a", "b"]
