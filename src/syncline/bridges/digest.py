"""The 64-bit digests of pieces of tensors, computed where they lie: what `receipt.py` makes its proofs of.

On a GPU all pieces of a batch are digested by one launch (`digest_kernel.py`): a launch each would cost more than the
reading. Batches are bounded, because pieces may have been made to be read once.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from syncline.bridges.manifest import Shard
from syncline.errors import SyncError

ROW_WORDS = 32
BATCH_BYTES = 1 << 30
_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as int64
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB
_CHUNK_WORDS = 1 << 24


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

    def positions(self, index: torch.Tensor) -> torch.Tensor:
        return self.first + index // self.length * self.stride + index % self.length


def _row(shape: Sequence[int]) -> int:
    return shape[-1] if shape else 1


Words = tuple[torch.Tensor, Places]
"""A piece's bits as flat integers, a word of the digest each, and where they lie in the whole."""


def piece_digests(shards: Iterable[tuple[str, Shard]]) -> list[int]:
    """One number a piece, modulo 2**64. All leave the device in one transfer, so a GPU is waited for once."""
    totals: list[torch.Tensor] = []
    batch: list[Words] = []
    num_bytes = 0
    for name, shard in shards:
        tensor = shard.tensor.detach()
        batch.append(_words(tensor, shard.shape[-1] if shard.shape else 1, Places.of(name, shard)))
        num_bytes += tensor.nbytes
        if num_bytes >= BATCH_BYTES:
            totals.append(_summed(batch))
            batch, num_bytes = [], 0
    if batch:
        totals.append(_summed(batch))
    return [value % (1 << 64) for value in torch.cat(totals).tolist()] if totals else []


def tensor_digest(tensor: torch.Tensor, *, offset: int = 0) -> int:
    """The digest of a tensor's bits; `offset` counts the elements before it in the full row-major tensor.

    Shards of whole rows have digests that add up, modulo 2**64.
    """
    row = tensor.shape[-1] if tensor.dim() else 1
    places = Places("tensor", offset, tensor.numel(), tensor.numel())
    return int(_summed([_words(tensor.detach(), row, places)])) % (1 << 64)


def _summed(batch: Sequence[Words]) -> torch.Tensor:
    """`[len(batch)]` int64, where the pieces lie."""
    if batch[0][0].is_cuda:
        from syncline.bridges.digest_kernel import mixed_sums

        return mixed_sums(batch)
    return torch.stack([_sum(words, places) for words, places in batch])


def _sum(words: torch.Tensor, places: Places) -> torch.Tensor:
    total = torch.zeros((), dtype=torch.int64)
    for start in range(0, words.numel(), _CHUNK_WORDS):
        chunk = words[start : start + _CHUNK_WORDS].to(torch.int64)
        index = torch.arange(start, start + chunk.numel())
        position = places.positions(index) if places.length < words.numel() else index + places.first
        total += mixed_words(chunk, position).sum()
    return total


def mixed_words(words: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """Each int64 word mixed with its position in the full tensor; a tensor's digest is their sum."""
    return _mix(words ^ (position * _GOLDEN))


def _words(tensor: torch.Tensor, row: int, places: Places) -> Words:
    """`row` is the last dimension of the whole."""
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
