"""The digests of what ranks hold, without a model: pieces measured and combined at once."""

from collections.abc import Callable, Iterable, Sequence

from syncline.bridges.blocks import Together
from syncline.bridges.digest import piece_sums
from syncline.bridges.manifest import Shard
from syncline.bridges.receipt import Combination, Piece

Rank = Sequence[tuple[str, Shard]]


def combined(ranks: Iterable[Rank]) -> dict[str, str]:
    return _combined(ranks, lambda rank: piece_sums(rank).digests)


def combined_together(ranks: Iterable[Rank], *, num_stages: int = 1) -> dict[str, str]:
    """As adapters are digested, all pieces of a rank in one buffer."""
    return _combined(ranks, lambda rank: Together(rank).digests(rank), num_stages=num_stages)


def _combined(ranks: Iterable[Rank], digests: Callable[[Rank], list[int]], *, num_stages: int = 1) -> dict[str, str]:
    found = [([Piece.of(*named) for named in rank], digests(rank)) for rank in ranks]
    pieces, sums = [pieces for pieces, _ in found], [sums for _, sums in found]
    return Combination(pieces, num_stages=num_stages).digests(sums)
