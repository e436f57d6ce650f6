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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from syncline.bridges.digest import piece_digests
from syncline.bridges.manifest import Shard
from syncline.errors import SyncError

_BATCH_BYTES = 256 << 20


class Piece(NamedTuple):
    """What one rank says of a piece it holds, in plain values that every wire carries."""

    kind: str
    """Of the whole: `bfloat16[151936, 896]`."""
    shape: Sequence[int]
    start: Sequence[int]
    counted: bool
    digest: str
    """Of the piece at its place in the whole, in hex: JSON and msgpack have no unsigned 64 bits."""


def parameter_digests(named: Iterable[tuple[str, torch.Tensor]]) -> dict[str, str]:
    """`name -> "dtype[shape]:digest"`, which names what differs when two sides disagree."""
    return combined([shard_digests((name, whole(tensor)) for name, tensor in named)])


def whole(tensor: torch.Tensor) -> Shard:
    """The tensor as the only piece of itself."""
    return Shard(tensor, tuple(tensor.shape), (0,) * tensor.dim())


def shard_digests(named: Iterable[tuple[str, Shard]]) -> dict[str, list[Piece]]:
    """One rank's pieces by name; a name may come several times. Copies that are not counted are digested too.

    All digests leave the device in one transfer, so a GPU is waited for once, not once a parameter. Raises `SyncError`
    for a piece that lies outside the whole, is cut in two dimensions, or inside a word.
    """
    facts: list[tuple[str, Piece]] = []

    def noted() -> Iterator[tuple[str, Shard]]:
        """A piece made to be read once is not held for what is said of it."""
        for name, shard in named:
            kind = kind_of(shard.tensor, shard.shape)
            facts.append((name, Piece(kind, list(shard.tensor.shape), list(shard.start), shard.counted, "")))
            yield name, shard

    values = piece_digests(noted())
    pieces: dict[str, list[Piece]] = {}
    for (name, piece), value in zip(facts, values, strict=True):
        pieces.setdefault(name, []).append(piece._replace(digest=f"{value:016x}"))
    return pieces


def combined(ranks: Sequence[Mapping[str, Sequence[Any]]]) -> dict[str, str]:
    """`name -> "dtype[shape]:digest"` of the wholes, from what `shard_digests` says on every rank, in rank order.

    Raises `SyncError` naming rank and parameter: one that a rank lacks or has as another kind, copies of a piece that
    differ, and pieces that do not make up the whole.
    """
    digests: dict[str, str] = {}
    for name in dict.fromkeys(name for rank in ranks for name in rank):
        lacking = [rank for rank, pieces in enumerate(ranks) if name not in pieces]
        if lacking:
            holder = next(rank for rank, pieces in enumerate(ranks) if name in pieces)
            raise SyncError(f"{name}: rank {lacking[0]} lacks it, rank {holder} holds it")
        digests[name] = _combine(name, [(r, Piece(*p)) for r, pieces in enumerate(ranks) for p in pieces[name]])
    return digests


def _combine(name: str, pieces: Sequence[tuple[int, Piece]]) -> str:
    _, first = pieces[0]
    holders: dict[tuple[tuple[int, ...], tuple[int, ...]], tuple[int, Piece]] = {}
    total = num_elements = 0
    for rank, piece in pieces:
        if piece.kind != first.kind:
            raise SyncError(f"{name}: rank {rank} holds it as {piece.kind}, rank 0 as {first.kind}")
        holder, held = holders.setdefault((tuple(piece.start), tuple(piece.shape)), (rank, piece))
        if held.digest != piece.digest:
            raise SyncError(f"{name}: ranks {holder} and {rank} hold different copies of it")
        if piece.counted:
            total += int(piece.digest, 16)
            num_elements += math.prod(piece.shape)
    size = math.prod(_shape_of(first.kind))
    if num_elements != size:
        raise SyncError(f"{name}: {pieces[-1][0] + 1} ranks hold {num_elements} of its {size} elements")
    return f"{first.kind}:{total % (1 << 64):016x}"


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


def refuse_not_finite(named: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Raises `SyncError` naming the first parameter that holds a NaN or an infinity; one pass over the memory.

    Two sides may agree, bit for bit, on weights that nothing can be sampled from.
    """
    for _ in finite(named):
        pass


def finite(named: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """Hands the tensors on and raises at their end as `refuse_not_finite` does. Holds a few of them at a time: they may
    have been made to be read once."""
    names: list[str] = []
    largest: list[torch.Tensor] = []
    batch: list[torch.Tensor] = []
    size = 0
    for name, tensor in named:
        yield name, tensor
        if tensor.numel():
            names.append(name)
            batch.append(tensor.detach())
            size += tensor.nbytes
        if size >= _BATCH_BYTES:
            largest += _largest(batch)
            batch, size = [], 0
    values = torch.stack(largest + _largest(batch)).tolist() if names else []
    bad = [name for name, value in zip(names, values, strict=True) if not math.isfinite(value)]
    if bad:
        raise SyncError(f"{bad[0]} is not finite ({len(bad)} of {len(names)} parameters); nothing was published")


def _largest(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """The largest magnitude of each; NaN and infinity carry through."""
    return list(torch._foreach_norm(tensors, ord=math.inf, dtype=torch.float32)) if tensors else []  # pyright: ignore


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
