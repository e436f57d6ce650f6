"""The 64-bit digests of pieces of tensors, computed where they lie: what `receipt.py` makes its proofs of.

On a GPU all pieces of a batch are digested by one launch (`digest_kernel.py`): a launch each would cost more than the
reading. The same pass counts what is not finite.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from syncline.bridges.manifest import Shard
from syncline.errors import SyncError

ROW_WORDS = 32
BATCH_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class Places:
    """Where a piece's elements (or words) lie in the row-major whole: runs of `length`, `stride` apart."""

    name: str
    first: int
    length: int
    stride: int

    @classmethod
    def of(cls, name: str, shard: Shard) -> "Places":
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

    def in_words(self, per_word: int) -> "Places":
        """Raises `SyncError` when a border falls inside a word."""
        if any(value % per_word for value in (self.first, self.length, self.stride)):
            raise SyncError(
                f"{self.name}: pieces of {self.length} of {self.stride} elements end inside a word of the digest; "
                f"use a tensor_parallel_size that divides {ROW_WORDS}"
            )
        return Places(self.name, self.first // per_word, self.length // per_word, self.stride // per_word)


@dataclass(frozen=True, slots=True)
class Lanes:
    """Where the exponents of a word's numbers lie: a number is not finite if its exponent is all ones.

    With `t = (word & exponent) ^ exponent`, which is zero in such a number's lane alone, `t + carry` reaches the lane's
    `sign` bit unless it is zero, and never the next lane.
    """

    exponent: int = 0
    carry: int = 0
    sign: int = 0

    @classmethod
    def of(cls, dtype: torch.dtype, per_word: int) -> "Lanes":
        """Of `per_word` numbers a word. Types without infinities have no lanes: all their words are finite."""
        width, exponent = _EXPONENTS.get(dtype, (0, 0))
        return cls(*(_int64(sum(lane << (width * i) for i in range(per_word))) for lane in _lane(width, exponent)))


_EXPONENTS = {
    torch.bfloat16: (16, 0x7F80),
    torch.float16: (16, 0x7C00),
    torch.float32: (32, 0x7F800000),
    torch.float64: (64, 0x7FF0000000000000),
}
"""Bits of a number, and which of them are its exponent."""


def _lane(width: int, exponent: int) -> tuple[int, int, int]:
    sign = 1 << (width - 1) if width else 0
    return exponent, max(0, sign - 1), sign


def _int64(bits: int) -> int:
    return bits - (1 << 64) if bits >> 63 else bits


class Words(NamedTuple):
    """A piece's bits as flat integers, a word of the digest each; their places in the whole; what they are made of."""

    bits: torch.Tensor
    places: Places
    lanes: Lanes

    @classmethod
    def of(cls, name: str, shard: Shard) -> "Words":
        """Bits of the piece's own memory, or of a copy where it is not contiguous. Raises `SyncError` for a piece that
        lies outside the whole, is cut in two dimensions, or inside a word."""
        row = shard.shape[-1] if shard.shape else 1
        return cls.laid(shard.tensor.detach(), row, Places.of(name, shard))

    @classmethod
    def laid(cls, tensor: torch.Tensor, row: int, places: Places) -> "Words":
        """`row` is the last dimension of the whole."""
        flat = tensor.contiguous().view(-1)
        per_word = 8 // flat.element_size()
        if row % (ROW_WORDS * per_word) == 0:
            whole_words = places.in_words(per_word)
            aligned = flat if flat.storage_offset() % per_word == 0 else flat.clone()
            return cls(aligned.view(torch.int64), whole_words, Lanes.of(tensor.dtype, per_word))
        integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()]
        return cls(flat.view(integers), places, Lanes.of(tensor.dtype, 1))


class Sums(NamedTuple):
    """What was found in each piece, in their order."""

    digests: list[int]
    """Modulo 2**64."""
    num_broken: list[int]
    """Words that hold a NaN or an infinity."""


Digest = Callable[[], torch.Tensor]
"""`[2, pieces]` int64, where the pieces lie, of what they hold now: sums, and words that are not finite."""


def prepared(batch: Sequence[Words]) -> Digest:
    """What does not change from one measurement to the next is done here. Digests in place: the words must stay."""
    if batch and batch[0].bits.is_cuda:
        from syncline.bridges.digest_kernel import Launch

        return Launch(batch)
    from syncline.bridges.digest_host import host_digest

    return lambda: host_digest(batch)


def sums(found: Sequence[torch.Tensor]) -> Sums:
    """All leave the device in one transfer, so a GPU is waited for once."""
    digests, num_broken = torch.cat(list(found), dim=1).tolist() if found else ([], [])
    return Sums([value % (1 << 64) for value in digests], num_broken)


def piece_sums(shards: Iterable[tuple[str, Shard]]) -> Sums:
    """Of pieces that may have been made to be read once: a batch of them is held at a time."""
    found: list[torch.Tensor] = []
    batch: list[Words] = []
    num_bytes = 0
    for name, shard in shards:
        batch.append(Words.of(name, shard))
        num_bytes += shard.tensor.nbytes
        if num_bytes >= BATCH_BYTES:
            found.append(prepared(batch)())
            batch, num_bytes = [], 0
    if batch:
        found.append(prepared(batch)())
    return sums(found)


def tensor_digest(tensor: torch.Tensor, *, offset: int = 0) -> int:
    """The digest of a tensor's bits; `offset` counts the elements before it in the full row-major tensor.

    Shards of whole rows have digests that add up, modulo 2**64.
    """
    row = tensor.shape[-1] if tensor.dim() else 1
    places = Places("tensor", offset, tensor.numel(), tensor.numel())
    [digest], _ = sums([prepared([Words.laid(tensor.detach(), row, places)])()])
    return digest
