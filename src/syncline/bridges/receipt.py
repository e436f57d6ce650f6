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
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from syncline.bridges.manifest import Shard
from syncline.errors import SyncError

ROW_WORDS = 32
_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as int64
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB
_CHUNK_WORDS = 1 << 24
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


def tensor_digest(tensor: torch.Tensor, *, offset: int = 0) -> int:
    """The 64-bit digest of a tensor's bits; `offset` counts the elements before it in the full row-major tensor.

    Shards of whole rows have digests that add up, modulo 2**64.
    """
    places = _Places("tensor", offset, tensor.numel(), tensor.numel())
    return int(_digest(tensor.detach(), _row(tensor.shape), places)) % (1 << 64)


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
    shards: list[tuple[str, Shard]] = []
    digests: list[torch.Tensor] = []
    for name, shard in named:
        shards.append((name, shard))
        digests.append(_digest(shard.tensor.detach(), _row(shard.shape), _Places.of(name, shard)))
    values = torch.stack(digests).tolist() if digests else []
    pieces: dict[str, list[Piece]] = {}
    for (name, shard), value in zip(shards, values, strict=True):
        kind = kind_of(shard.tensor, shard.shape)
        digest = f"{value % (1 << 64):016x}"
        piece = Piece(kind, list(shard.tensor.shape), list(shard.start), shard.counted, digest)
        pieces.setdefault(name, []).append(piece)
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


@dataclass(frozen=True, slots=True)
class _Places:
    """Where a piece's elements (or words) lie in the row-major whole: runs of `length`, `stride` apart."""

    name: str
    first: int
    length: int
    stride: int

    @classmethod
    def of(cls, name: str, shard: Shard) -> "_Places":
        piece, shape, start = tuple(shard.tensor.shape), shard.shape, shard.start
        inside = len(piece) == len(shape) == len(start) and all(
            s >= 0 and s + p <= w for s, p, w in zip(start, piece, shape, strict=True)
        )
        cut = [i for i, (p, w) in enumerate(zip(piece, shape, strict=False)) if p != w]
        if not inside or len(cut) > 1:
            raise SyncError(
                f"{name}: a piece {list(piece)} at {list(start)} is not a slice of {list(shape)} along one dimension"
            )
        if not cut:
            return cls(name, 0, math.prod(shape), math.prod(shape))
        dimension = cut[0]
        inner = math.prod(shape[dimension + 1 :])
        return cls(name, start[dimension] * inner, piece[dimension] * inner, shape[dimension] * inner)

    def in_words(self, per_word: int) -> "_Places":
        """Raises `SyncError` when a border falls inside a word."""
        if any(value % per_word for value in (self.first, self.length, self.stride)):
            raise SyncError(
                f"{self.name}: pieces of {self.length} of {self.stride} elements end inside a word of the digest; "
                f"use a tensor_parallel_size that divides {ROW_WORDS}"
            )
        return _Places(self.name, self.first // per_word, self.length // per_word, self.stride // per_word)

    def positions(self, index: torch.Tensor) -> torch.Tensor:
        return self.first + index // self.length * self.stride + index % self.length


def _row(shape: Sequence[int]) -> int:
    return shape[-1] if shape else 1


def _digest(tensor: torch.Tensor, row: int, places: _Places) -> torch.Tensor:
    """The digest as a 0-d int64 tensor where `tensor` lies; `row` is the whole's last dimension."""
    words, places = _words(tensor, row, places)
    if words.is_cuda:
        from syncline.bridges.digest_kernel import mixed_sum

        return mixed_sum(words, first=places.first, length=places.length, stride=places.stride)
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, words.numel(), _CHUNK_WORDS):
        chunk = words[start : start + _CHUNK_WORDS].to(torch.int64)
        index = torch.arange(start, start + chunk.numel(), device=chunk.device)
        position = places.positions(index) if places.length < words.numel() else index + places.first
        total += mixed_words(chunk, position).sum()
    return total


def mixed_words(words: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """Each int64 word mixed with its position in the full tensor; a tensor's digest is their sum."""
    return _mix(words ^ (position * _GOLDEN))


def _words(tensor: torch.Tensor, row: int, places: _Places) -> tuple[torch.Tensor, _Places]:
    """The bits as integers, a word each, and their places."""
    flat = tensor.contiguous().view(-1)
    per_word = 8 // flat.element_size()
    if row % (ROW_WORDS * per_word) == 0:
        whole_words = places.in_words(per_word)
        aligned = flat if flat.storage_offset() % per_word == 0 else flat.clone()
        return aligned.view(torch.int64), whole_words
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()]
    return flat.view(integers), places


def _mix(x: torch.Tensor) -> torch.Tensor:
    """splitmix64's finaliser on int64 (torch shifts arithmetically, so the sign bits are masked off)."""
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * _MIX_1
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * _MIX_2
    return x ^ ((x >> 31) & ((1 << 33) - 1))
