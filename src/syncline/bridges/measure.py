"""A model measured again and again: what stays the same from one version to the next is worked out once.

Naming 290 parameters, finding their places and telling a GPU of them takes Python longer than the GPU takes to read
them. So a `Measure` notes where the parameters lay, and while they lie there a digest is one launch and one copy back.
Weights that were made to be read once (merged adapters, gathered shards) are named and read anew each time.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.distributed.tensor import DTensor

from syncline.bridges.digest import Digest, Words, piece_sums, prepared, sums
from syncline.bridges.manifest import Shard
from syncline.bridges.ranks import ONE_RANK, Ranks
from syncline.bridges.receipt import Combination, Piece, refuse_broken

Pieces = Callable[[Any], Iterable[tuple[str, Shard]]]


class Reading(NamedTuple):
    """What one rank measured, in plain values; `layout` says of which pieces."""

    layout: str
    digests: list[int]
    num_broken: list[int]


def layout_of(pieces: Sequence[Piece]) -> str:
    """By what a reading tells which pieces it is of."""
    return hashlib.sha256(repr(pieces).encode()).hexdigest()


class Wholes:
    """What the readings of several ranks make up. Which pieces they are of is worked out once for each layout."""

    def __init__(self) -> None:
        self._layouts: list[str] = []
        self._combination = Combination([])
        self.pieces: list[list[Piece]] = []

    def knows(self, readings: Sequence[Reading]) -> bool:
        """Whether they are of the pieces that were learned last."""
        return [reading.layout for reading in readings] == self._layouts

    def learn(self, readings: Sequence[Reading], pieces: Sequence[Sequence[Any]], *, num_stages: int = 1) -> None:
        """`pieces`: of each rank, as it told them, stage by stage of a pipeline. Raises `SyncError` where they do not
        make up wholes."""
        self.pieces = [[Piece(*piece) for piece in rank] for rank in pieces]
        self._combination = Combination(self.pieces, num_stages=num_stages)
        self._layouts = [reading.layout for reading in readings]

    def digests(self, readings: Sequence[Reading]) -> dict[str, str]:
        """`name -> "dtype[shape]:digest"`; raises `SyncError` for copies of a piece that differ."""
        return self._combination.digests([reading.digests for reading in readings])


class Measure:
    """One rank's side. `pieces(model)` yields what it holds, under checkpoint names."""

    def __init__(self, pieces: Pieces) -> None:
        self._named = pieces
        self._lay: tuple[int, ...] = ()
        """Where every parameter lay when the digest was prepared."""
        self._digest: Digest | None = None
        self.layout = ""
        self.pieces: list[Piece] = []
        """What was measured last."""

    def read(self, model: Any) -> Reading:
        """Raises `SyncError` for a piece that cannot be digested at its place in the whole."""
        lie = tuple(parameter.data_ptr() for parameter in _local(model))
        if self._digest is None or lie != self._lay:
            self._digest = None
            found, stays = self._named_anew(model)
            if stays:
                self._prepare(model, lie)
        else:
            found = sums([self._digest()])
        return Reading(self.layout, *found)

    def _named_anew(self, model: Any) -> tuple[Any, bool]:
        """The sums, and whether every piece is memory of the model's own, read where it lies."""
        memory = {parameter.untyped_storage().data_ptr() for parameter in _local(model)}
        pieces: list[Piece] = []
        stays = True

        def noted() -> Iterator[tuple[str, Shard]]:
            nonlocal stays
            for name, shard in self._named(model):
                pieces.append(Piece.of(name, shard))
                stays = stays and shard.tensor.untyped_storage().data_ptr() in memory and shard.tensor.is_contiguous()
                yield name, shard

        found = piece_sums(noted())
        self.pieces = pieces
        self.layout = layout_of(pieces)
        return found, stays

    def _prepare(self, model: Any, lie: tuple[int, ...]) -> None:
        words = [(shard, Words.of(name, shard)) for name, shard in self._named(model)]
        if all(one.bits.data_ptr() == shard.tensor.data_ptr() for shard, one in words):
            self._lay, self._digest = lie, prepared([one for _, one in words])


class LearnerDigests:
    """The learner's side of a proof: digests of the wholes, from the pieces of all its ranks."""

    def __init__(self, pieces: Pieces, *, ranks: Ranks = ONE_RANK) -> None:
        self._measure = Measure(pieces)
        self._ranks = ranks
        self._wholes = Wholes()

    def of(self, model: Any) -> dict[str, str]:
        """`name -> "dtype[shape]:digest"`, on every rank. Raises `SyncError` naming a parameter that is not finite."""
        readings = self._ranks.gathered(self._measure.read(model))
        if not self._wholes.knows(readings):
            self._wholes.learn(readings, self._ranks.gathered(self._measure.pieces))
        if any(map(any, (reading.num_broken for reading in readings))):
            refuse_broken(self._wholes.pieces, [reading.num_broken for reading in readings])
        return self._wholes.digests(readings)


def _local(model: Any) -> Iterator[torch.Tensor]:
    """The memory this rank has of each parameter."""
    for parameter in model.parameters():
        yield parameter._local_tensor if isinstance(parameter, DTensor) else parameter
