"""The digests of what ranks hold, without a model: pieces measured and combined at once."""

from collections.abc import Iterable, Sequence

from syncline.bridges.digest import piece_sums
from syncline.bridges.manifest import Shard
from syncline.bridges.receipt import Combination, Piece

Pieces = Sequence[tuple[str, Shard]]


def combined(ranks: Iterable[Pieces]) -> dict[str, str]:
    ranks = [list(rank) for rank in ranks]
    combination = Combination([[Piece.of(name, shard) for name, shard in rank] for rank in ranks])
    return combination.digests([piece_sums(rank).digests for rank in ranks])
