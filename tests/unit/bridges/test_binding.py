"""Rebinding pieces to shared memory: the very bytes, and refused by name where the pieces are not the same."""

import pytest
import torch

from syncline.bridges.handles import bind
from syncline.bridges.manifest import Shard
from syncline.errors import SyncError


def piece(rows: int, *, start: int = 4) -> Shard:
    return Shard(torch.zeros(rows, 2), (8, 2), (start, 0))


def test_a_bound_piece_is_the_others_memory() -> None:
    own, theirs = piece(4), piece(4)
    bind({"q": own}, {"q": theirs}, rank=1)
    own.tensor.add_(1.0)
    assert theirs.tensor.tolist() == [[1.0, 1.0]] * 4


def test_what_a_piece_was_in_is_given_back_once_nothing_is_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    own, theirs, found = piece(4), piece(4), []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: found.append(own.tensor.data_ptr()))
    bind({"q": own}, {"q": theirs}, rank=1)
    assert found == [theirs.tensor.data_ptr()]


@pytest.mark.parametrize(
    ("theirs", "told"),
    [
        ({"q": piece(3)}, r"q: the learner float32\[4, 2\] at \[4, 0\] of \[8, 2\], the engine float32\[3, 2\]"),
        ({"q": piece(4, start=0)}, r"q: the learner .* at \[4, 0\] .*, the engine .* at \[0, 0\]"),
        ({}, r"q: missing in the engine"),
        ({"q": piece(4), "k": piece(4)}, r"k: not in the learner"),
    ],
)
def test_another_piece_is_refused_by_rank_and_parameter(theirs: dict[str, Shard], told: str) -> None:
    own = {"q": piece(4)}
    with pytest.raises(SyncError, match=rf"rank 1: .*\n{told}"):
        bind(own, theirs, rank=1)
    own["q"].tensor.add_(1.0)
    assert all(not shard.tensor.any() for shard in theirs.values()), "nothing may be bound by halves"
