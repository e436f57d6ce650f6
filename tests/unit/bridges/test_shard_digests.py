"""Digests of shards: they add up to the whole's whatever the split, and say which rank is at fault when they do not."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rank_digests import combined

from syncline.bridges.digest import ROW_WORDS, piece_sums, tensor_digest
from syncline.bridges.manifest import Shard
from syncline.bridges.receipt import Combination, Piece, parameter_digests, whole
from syncline.errors import SyncError

DTYPES = (torch.float32, torch.bfloat16, torch.uint8, torch.int64)


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    num_bytes = math.prod(shape) * dtype.itemsize
    return torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, generator=generator).view(dtype).view(shape)


def split(tensor: torch.Tensor, num_ranks: int, dim: int) -> list[Shard]:
    """Equal pieces along `dim`, the last one shorter, as views of the whole."""
    size = -(-tensor.shape[dim] // num_ranks)
    shards = []
    for rank in range(num_ranks):
        first = min(rank * size, tensor.shape[dim])
        piece = tensor.narrow(dim, first, min(size, tensor.shape[dim] - first))
        shards.append(Shard(piece, tuple(tensor.shape), tuple(first if d == dim else 0 for d in range(tensor.dim()))))
    return shards


@st.composite
def split_tensors(draw) -> tuple[torch.Tensor, list[Shard]]:
    """A tensor of one to three dimensions and how ranks hold it; rows of whole and of broken words."""
    dtype = draw(st.sampled_from(DTYPES))
    num_ranks = draw(st.sampled_from((1, 2, 3, 4, 8)))
    words = ROW_WORDS * 8 // dtype.itemsize
    row = draw(st.one_of(st.integers(1, 40), st.sampled_from((words, 3 * words, words + 1, words // 2))))
    shape = (*draw(st.lists(st.integers(1, 9), max_size=2)), row)
    dim = draw(st.integers(0, len(shape) - 1))
    if dim == len(shape) - 1:
        shape = (*shape[:-1], row * num_ranks)
    tensor = random_tensor(shape, dtype, draw(st.integers(0, 5)))
    return tensor, split(tensor, num_ranks, dim)


@settings(max_examples=150)
@given(split_tensors())
def test_digests_of_shards_add_up_to_the_digest_of_the_whole(case: tuple[torch.Tensor, list[Shard]]) -> None:
    tensor, shards = case
    expected = {"w": f"{str(tensor.dtype)[6:]}{list(tensor.shape)}:{tensor_digest(tensor):016x}"}
    assert combined([[("w", shard)] for shard in shards]) == expected
    assert parameter_digests([("w", tensor)]) == expected


def test_a_piece_digests_at_its_place_in_the_whole() -> None:
    """By hand: columns 2 and 3 of a 2 x 4 matrix of int64 (every element a word) are positions 2, 3, 6 and 7."""
    tensor = torch.zeros(2, 4 * ROW_WORDS, dtype=torch.int64)
    tensor[0, 2], tensor[0, 3], tensor[1, 2], tensor[1, 3] = 11, 12, 13, 14
    piece = Shard(tensor[:, 2:4], tuple(tensor.shape), (0, 2))
    width = 4 * ROW_WORDS
    expected = sum(mixed(word, position) for word, position in ((11, 2), (12, 3), (13, width + 2), (14, width + 3)))
    assert piece_sums([("w", piece)]).digests == [expected % (1 << 64)]


def mixed(word: int, position: int) -> int:
    mask = (1 << 64) - 1
    x = (word ^ (position * 0x9E3779B97F4A7C15)) & mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return x ^ (x >> 31)


def test_the_same_bits_at_another_place_have_another_digest() -> None:
    tensor = torch.ones(4, 256)
    left, right = split(tensor, 2, 1)
    a, b = piece_sums([("w", left), ("w", right)]).digests
    assert a != b


def test_pieces_of_one_name_on_one_rank_are_all_counted() -> None:
    """A checkpoint that fuses q, k and v: every rank holds a piece of each."""
    tensor = random_tensor((12, 128), torch.float32)
    ranks = [[("qkv", Shard(tensor[r : r + 2], (12, 128), (r, 0))) for r in rows] for rows in ((0, 4, 8), (2, 6, 10))]
    assert combined(ranks) == parameter_digests([("qkv", tensor)])


def test_copies_are_counted_once_and_compared() -> None:
    norm = random_tensor((64,), torch.float32)
    ranks = [[("norm", Shard(norm, (64,), (0,), counted=rank == 0))] for rank in range(2)]
    assert combined(ranks) == parameter_digests([("norm", norm)])
    other = norm.clone()
    other.view(torch.int32)[3] ^= 1
    ranks[1] = [("norm", Shard(other, (64,), (0,), counted=False))]
    with pytest.raises(SyncError, match="norm: ranks 0 and 1 hold different copies"):
        combined(ranks)


def test_a_rank_that_lacks_a_parameter_is_named() -> None:
    copy = Shard(torch.ones(2), (2,), (0,), counted=False)
    ranks = [[("a", whole(torch.ones(2))), ("b", whole(torch.ones(2)))], [("a", copy)]]
    with pytest.raises(SyncError, match="b: rank 1 lacks it, rank 0 holds it"):
        combined(ranks)


def test_a_rank_with_another_kind_is_named() -> None:
    ranks = [[("a", whole(torch.ones(2, dtype=dtype)))] for dtype in (torch.float32, torch.bfloat16)]
    with pytest.raises(SyncError, match=r"a: rank 1 holds it as bfloat16\[2\], rank 0 as float32\[2\]"):
        combined(ranks)


def test_pieces_that_leave_a_hole_are_an_error() -> None:
    shards = split(torch.ones(6, 128), 3, 0)
    with pytest.raises(SyncError, match="2 ranks hold 512 of its 768 elements"):
        combined([[("w", shard)] for shard in shards[:2]])


def test_a_border_inside_a_word_is_refused_by_parameter() -> None:
    """32 words of bfloat16 are 128 elements: 64 ranks would hold half a word each."""
    tensor = torch.ones(2, 128, dtype=torch.bfloat16)
    with pytest.raises(SyncError, match=r"down_proj: pieces of 2 of 128 elements end inside a word"):
        piece_sums([("down_proj", split(tensor, 64, 1)[3])])


@pytest.mark.parametrize(
    ("shape", "start"), [((4, 4), (0, 0)), ((2, 4), (3, 0)), ((8,), (0,))], ids=["two dimensions", "outside", "flat"]
)
def test_a_piece_that_is_no_slice_of_the_whole_is_refused(shape: tuple[int, ...], start: tuple[int, ...]) -> None:
    with pytest.raises(SyncError, match=r"w: a piece .* is not a slice of"):
        piece_sums([("w", Shard(torch.ones(2, 2), shape, start))])


def test_stages_hold_other_layers_and_what_two_of_them_hold_counts_once() -> None:
    """Two stages of two ranks: layers a and b, and tied embeddings e in both."""
    tensors = {name: random_tensor((8, 16), torch.float32, seed) for seed, name in enumerate("abe")}
    shards = {name: split(tensor, 2, 0) for name, tensor in tensors.items()}
    first = [{"a": shards["a"][rank], "e": shards["e"][rank]} for rank in range(2)]
    second = [{"b": shards["b"][rank], "e": shards["e"][rank]} for rank in range(2)]
    ranks = [list(rank.items()) for rank in (*first, *second)]
    found = [piece_sums(iter(rank)).digests for rank in ranks]
    pieces = [[Piece.of(name, shard) for name, shard in rank] for rank in ranks]
    expected = parameter_digests(tensors.items())
    assert Combination(pieces, num_stages=2).digests(found) == expected
    stale = [*found[:3], [found[3][0], found[3][1] + 1]]
    with pytest.raises(SyncError, match="e: ranks 1 and 3 hold different copies of it"):
        Combination(pieces, num_stages=2).digests(stale)
    with pytest.raises(SyncError, match="a: rank 2 lacks it, rank 0 holds it"):
        Combination(pieces)
    with pytest.raises(SyncError, match="b: rank 3 lacks it, rank 2 holds it"):
        Combination([*pieces[:3], pieces[3][1:]], num_stages=2)
