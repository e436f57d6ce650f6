"""Pieces of many tensors in one pass: their digests add up to the whole's, wherever the borders between words lie."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rank_digests import combined_together

from syncline.bridges.adapter import AdapterLayout
from syncline.bridges.blocks import Together
from syncline.bridges.manifest import Shard
from syncline.errors import SyncError

DTYPES = (torch.float32, torch.bfloat16)


def pieces(tensor: torch.Tensor, num_ranks: int, dim: int) -> list[Shard]:
    size = tensor.shape[dim] // num_ranks
    starts = [[0, 0] for _ in range(num_ranks)]
    for rank, start in enumerate(starts):
        start[dim] = rank * size
    chunks = zip(tensor.split(size, dim), starts, strict=True)
    return [Shard(chunk, tuple(tensor.shape), tuple(start)) for chunk, start in chunks]


def whole_digest(tensor: torch.Tensor) -> str:
    layout = AdapterLayout({"w": tensor.shape}, str(tensor.dtype).removeprefix("torch."))
    buffer = layout.new_buffer(torch.device("cpu"))
    layout.views(buffer)["w"].copy_(tensor)
    return layout.on(buffer).digests()["w"]


@settings(max_examples=60)
@given(
    st.sampled_from(DTYPES),
    st.integers(1, 9),
    st.integers(1, 400),
    st.sampled_from((1, 2, 3, 4, 8)),
    st.sampled_from((0, 1)),
)
def test_the_digests_of_pieces_add_up(dtype: torch.dtype, rank: int, size: int, num_ranks: int, dim: int) -> None:
    """Rows of B [outputs, rank] and columns of A [rank, inputs], a whole number of words each."""
    size *= 4 * num_ranks
    tensor = torch.randn((size, rank) if dim == 0 else (rank, size)).to(dtype)
    ranks = [[("other", piece), ("w", piece)] for piece in pieces(tensor, num_ranks, dim)]
    assert combined_together(ranks) == {"other": whole_digest(tensor), "w": whole_digest(tensor)}


def test_a_whole_tensor_need_not_be_of_whole_words() -> None:
    tensor = torch.randn(3, 7).bfloat16()
    shard = Shard(tensor, (3, 7), (0, 0))
    assert combined_together([[("w", shard)]]) == {"w": whole_digest(tensor)}


@pytest.mark.parametrize(("shape", "dim"), [((2, 12), 1), ((6, 1), 0)])
def test_a_piece_that_ends_inside_a_word_is_refused_by_name(shape: tuple[int, int], dim: int) -> None:
    first, _ = pieces(torch.randn(shape).bfloat16(), 2, dim)
    with pytest.raises(SyncError, match=r"^w: a rank's .* ends inside a word.*bridge\.name to restart"):
        Together([("w", first)])
