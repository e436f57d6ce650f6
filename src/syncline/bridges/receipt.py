"""The digest of a model's weights: equal on both sides, or the sync has failed.

A parameter's digest is the sum, modulo 2**64, of a mixed 64-bit word for each eight bytes of its row-major bits and
their position in the full tensor. A sum of position-mixed words has two properties a plain hash lacks: it runs at
memory speed where the tensor lies, and the digests of disjoint shards add up to the digest of the whole, so tensor-
parallel ranks prove their shards without gathering them. The mixer is splitmix64 (Steele, Lea, Flood 2014, "Fast
splittable pseudorandom number generators"). It catches faults (stale, swapped, truncated, half-written tensors);
it does not withstand somebody who crafts a collision.

What a word is depends on the whole tensor alone, since the side that holds the whole knows no split: eight bytes where
the last dimension is a multiple of `ROW_WORDS` words, one element elsewhere. Then no word straddles two shards: rows
are whole words, and a split of the last dimension into n equal parts falls between words for every n that divides
`ROW_WORDS`, and for 3 and other odd n times that.
"""

import hashlib
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch

from syncline.bridges.digest import piece_sums
from syncline.bridges.manifest import Shard
from syncline.errors import SyncError

_MASK = (1 << 64) - 1
_Place = tuple[int, int]
"""Of a piece: its rank, and its index among the rank's."""


class Piece(NamedTuple):
    """What one rank says of a piece it holds, in plain values that every wire carries."""

    name: str
    """Several pieces of one rank may have the same."""
    kind: str
    """Of the whole: `bfloat16[151936, 896]`."""
    shape: Sequence[int]
    start: Sequence[int]
    counted: bool
    """`False`: another rank holds the same piece and counts it."""

    @classmethod
    def of(cls, name: str, shard: Shard) -> "Piece":
        kind = kind_of(shard.tensor, shard.shape)
        return cls(name, kind, list(shard.tensor.shape), list(shard.start), shard.counted)


def parameter_digests(named: Iterable[tuple[str, torch.Tensor]], *, finite: bool = False) -> dict[str, str]:
    """`name -> "dtype[shape]:digest"`, which names what differs when two sides disagree; one pass over the memory.

    With `finite` raises `SyncError` naming the first parameter that holds a NaN or an infinity: two sides may agree,
    bit for bit, on weights that nothing can be sampled from.
    """
    pieces: list[Piece] = []

    def noted() -> Iterator[tuple[str, Shard]]:
        """A tensor made to be read once is not held for what is said of it."""
        for name, tensor in named:
            shard = whole(tensor)
            pieces.append(Piece.of(name, shard))
            yield name, shard

    found = piece_sums(noted())
    if finite:
        refuse_broken([pieces], [found.num_broken])
    return Combination([pieces]).digests([found.digests])


def whole(tensor: torch.Tensor) -> Shard:
    """The tensor as the only piece of itself."""
    return Shard(tensor, tuple(tensor.shape), (0,) * tensor.dim())


def refuse_broken(ranks: Sequence[Sequence[Piece]], num_broken: Sequence[Sequence[int]]) -> None:
    """Raises `SyncError` when a piece of a rank has words that are not finite."""
    counts: defaultdict[str, int] = defaultdict(int)
    for pieces, numbers in zip(ranks, num_broken, strict=True):
        for piece, number in zip(pieces, numbers, strict=True):
            counts[piece.name] += number
    if bad := [name for name, count in counts.items() if count]:
        raise SyncError(f"{bad[0]} is not finite ({len(bad)} of {len(counts)} parameters); it is never published")


class Combination:
    """How the pieces that ranks hold, by rank, make up the parameters: worked out once, summed at every proof.

    Ranks are of `num_stages` pipeline stages, which hold other layers each; what several hold is the first one's to
    count. Raises `SyncError` naming rank and parameter: one that a rank of a stage lacks or has as another kind, and
    pieces that do not make up the whole.
    """

    def __init__(self, ranks: Sequence[Sequence[Piece]], *, num_stages: int = 1) -> None:
        self._ranks_per_stage = max(1, len(ranks) // num_stages)
        self._wholes: list[tuple[str, str, list[_Place]]] = []
        self._copies: list[tuple[str, _Place, _Place]] = []
        held: dict[str, list[tuple[_Place, Piece]]] = {}
        for rank, pieces in enumerate(ranks):
            for index, piece in enumerate(pieces):
                held.setdefault(piece.name, []).append(((rank, index), piece))
        for name, pieces in held.items():
            self._refuse_lacking(name, {rank for (rank, _), _ in pieces})
            self._add(name, pieces)

    def _refuse_lacking(self, name: str, holders: set[int]) -> None:
        size = self._ranks_per_stage
        stages = {rank // size for rank in holders}
        if lacking := sorted({stage * size + i for stage in stages for i in range(size)} - holders):
            raise SyncError(f"{name}: rank {lacking[0]} lacks it, rank {min(holders)} holds it")

    def _add(self, name: str, pieces: Sequence[tuple["_Place", Piece]]) -> None:
        _, first = pieces[0]
        holders: dict[tuple[tuple[int, ...], tuple[int, ...]], _Place] = {}
        counted: list[_Place] = []
        num_elements = 0
        stage = pieces[0][0][0] // self._ranks_per_stage
        for place, piece in pieces:
            if piece.kind != first.kind:
                raise SyncError(f"{name}: rank {place[0]} holds it as {piece.kind}, rank 0 as {first.kind}")
            holder = holders.setdefault((tuple(piece.start), tuple(piece.shape)), place)
            if holder != place:
                self._copies.append((name, holder, place))
            if piece.counted and place[0] // self._ranks_per_stage == stage:
                counted.append(place)
                num_elements += math.prod(piece.shape)
        size = math.prod(_shape_of(first.kind))
        if num_elements != size:
            raise SyncError(f"{name}: {pieces[-1][0][0] + 1} ranks hold {num_elements} of its {size} elements")
        self._wholes.append((name, first.kind, counted))

    def digests(self, found: Sequence[Sequence[int]]) -> dict[str, str]:
        """`name -> "dtype[shape]:digest"` of the wholes, from the digests of every rank's pieces. Raises `SyncError`
        for copies of a piece that differ."""
        for name, (rank, index), (other, position) in self._copies:
            if found[rank][index] != found[other][position]:
                raise SyncError(f"{name}: ranks {rank} and {other} hold different copies of it")
        return {
            name: f"{kind}:{sum([found[rank][index] for rank, index in counted]) & _MASK:016x}"
            for name, kind, counted in self._wholes
        }


def kind_of(tensor: torch.Tensor, shape: Sequence[int] | None = None) -> str:
    """`bfloat16[151936, 896]`: what two sides must agree on before any weights move. `shape`: of the whole."""
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape if shape is None else shape)}"


def _shape_of(kind: str) -> list[int]:
    numbers = kind.partition("[")[2].removesuffix("]")
    return [int(number) for number in numbers.split(",") if number.strip()]


def model_digest(parameters: Mapping[str, str]) -> str:
    """One digest over all parameters, independent of their order."""
    lines = "\n".join(f"{name}={digest}" for name, digest in sorted(parameters.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def differences(
    learner: Mapping[str, str], engine: Mapping[str, str], *, left: str = "the learner", limit: int = 5
) -> list[str]:
    """What differs between two sides, a line a parameter, at most `limit` lines and a count of the rest."""
    lines = [f"{name}: missing in the engine" for name in sorted(learner.keys() - engine.keys())]
    lines += [f"{name}: not in {left}" for name in sorted(engine.keys() - learner.keys())]
    lines += [
        f"{name}: {left} {learner[name]}, the engine {engine[name]}"
        for name in sorted(learner.keys() & engine.keys())
        if learner[name] != engine[name]
    ]
    rest = len(lines) - limit
    return lines[:limit] + ([f"… and {rest} more"] if rest > 0 else [])
