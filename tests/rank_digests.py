"""The digests of what ranks hold, without a model: pieces measured and combined at once."""

from collections.abc import Iterable, Sequence

from syncline.bridges import receipt
from syncline.bridges.digest import piece_sums
from syncline.bridges.manifest import Shard


def combined(ranks: Iterable[Sequence[tuple[str, Shard]]]) -> dict[str, str]:
    found = ((rank, piece_sums(rank).digests) for rank in ranks)
    return receipt.combined(
        [[(receipt.Piece.of(*named), one) for named, one in zip(rank, sums, strict=True)] for rank, sums in found]
    )
