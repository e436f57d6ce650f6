"""The digests of `digest.py` in a CPU's memory: the passes over a chunk are numpy's, which writes them into memory that
the cache holds; torch's would each take memory of their own, and as long as nine of these."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

if TYPE_CHECKING:
    from syncline.bridges.digest import Words

_CHUNK_WORDS = 1 << 15
_MASK = (1 << 64) - 1
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIXES = (np.uint64(30), np.uint64(0xBF58476D1CE4E5B9)), (np.uint64(27), np.uint64(0x94D049BB133111EB))
_LAST_SHIFT = np.uint64(31)
_RAMP = np.arange(_CHUNK_WORDS, dtype=np.uint64) * _GOLDEN
Integers = NDArray[np.uint64]


def host_digest(batch: "Sequence[Words]") -> torch.Tensor:
    """What `digest.Digest` says."""
    scratch = np.empty((2, _CHUNK_WORDS), dtype=np.uint64)
    found = np.array([_sums(words, scratch) for words in batch], dtype=np.uint64).reshape(-1, 2)
    return torch.from_numpy(found.view(np.int64).T.copy())


def _sums(words: "Words", scratch: Integers) -> tuple[int, int]:
    """The sum of the mixed words, modulo 2**64, and how many words are not finite."""
    lanes = (words.lanes.exponent, words.lanes.carry, words.lanes.sign)
    exponent, carry, sign = (np.uint64(bits & _MASK) for bits in lanes)
    total = num_broken = 0
    for chunk, positions in _chunks(words):
        x, y = (memory[: chunk.size].reshape(chunk.shape) for memory in scratch)
        np.add(positions * _GOLDEN, _RAMP[: chunk.shape[1]], out=x)
        x ^= chunk
        for shift, factor in _MIXES:
            np.right_shift(x, shift, out=y)
            x ^= y
            x *= factor
        np.right_shift(x, _LAST_SHIFT, out=y)
        x ^= y
        total += int(x.sum(dtype=np.uint64))
        np.bitwise_and(chunk, exponent, out=y)
        y ^= exponent
        y += carry
        np.invert(y, out=y)
        y &= sign
        num_broken += int(np.count_nonzero(y))
    return total & _MASK, num_broken


def _chunks(words: "Words") -> Iterator[tuple[Integers, Integers]]:
    """`[runs, words]`, of several runs or of a part of one, and `[runs, 1]`: where in the whole each begins."""
    places = words.places
    runs = words.bits.numpy().reshape(-1, max(1, places.length))
    together = max(1, _CHUNK_WORDS // runs.shape[1])
    starts = np.arange(len(runs), dtype=np.uint64)[:, None] * np.uint64(places.stride) + np.uint64(places.first)
    for run in range(0, len(runs), together):
        for column in range(0, places.length, _CHUNK_WORDS):
            chunk = runs[run : run + together, column : column + _CHUNK_WORDS]
            yield chunk.astype(np.int64, copy=False).view(np.uint64), starts[run : run + together] + np.uint64(column)
