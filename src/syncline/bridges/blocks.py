"""Many tensors side by side in one buffer, digested in one pass: a launch for each would cost more than the reading.

A word of the digest is eight bytes of the row-major bits of the whole tensor, the last one filled with zeros, so a
piece of a tensor must begin and end between words; then the pieces' digests add up to the whole's, as in `receipt.py`.
What does not change from one digest to the next (views, places, a GPU's table of them) is made once.
"""

import math
from collections.abc import Sequence
from itertools import accumulate

import torch

from syncline.bridges.digest import Lanes, Places, Sums, Words, prepared, sums
from syncline.bridges.manifest import Shard
from syncline.bridges.receipt import Piece
from syncline.errors import SyncError

_BLOCK_WORDS = 512
"""Every tensor starts at a block's boundary."""
_WORD_BYTES = 8


class Blocks:
    """Where tensors of these shapes and one type lie, in their order."""

    def __init__(self, shapes: Sequence[Sequence[int]], dtype: torch.dtype) -> None:
        self.shapes = [tuple(shape) for shape in shapes]
        self.dtype = dtype
        sizes = [math.prod(shape) * dtype.itemsize for shape in self.shapes]
        self.num_bytes = sum(sizes)
        self.num_words = [-(-size // _WORD_BYTES) for size in sizes]
        """Of each tensor."""
        blocks = [-(-words // _BLOCK_WORDS) for words in self.num_words]
        self._first_words = [_BLOCK_WORDS * before for before in accumulate(blocks, initial=0)]
        self.buffer_words = self._first_words.pop()

    def new_buffer(self, device: torch.device) -> torch.Tensor:
        """`[buffer_words]` int64, zeros."""
        return torch.zeros(self.buffer_words, dtype=torch.int64, device=device)

    def views(self, buffer: torch.Tensor) -> list[torch.Tensor]:
        """Each tensor as a view of the buffer."""
        elements, per_word = buffer.view(self.dtype), _WORD_BYTES // self.dtype.itemsize
        return [
            elements.narrow(0, first * per_word, math.prod(shape)).view(shape)
            for first, shape in zip(self._first_words, self.shapes, strict=True)
        ]

    def words(self, buffer: torch.Tensor, places: Sequence[Places] | None = None) -> list[Words]:
        """Each tensor's. `places`: in words, of tensors that are pieces of others."""
        places = places or [Places("", 0, num_words, num_words) for num_words in self.num_words]
        lanes = Lanes.of(self.dtype, _WORD_BYTES // self.dtype.itemsize)
        where = zip(self._first_words, self.num_words, places, strict=True)
        return [Words(buffer.narrow(0, first, num_words), place, lanes) for first, num_words, place in where]


class Packed:
    """A buffer of such tensors, to be filled and digested again and again."""

    def __init__(self, blocks: Blocks, buffer: torch.Tensor, places: Sequence[Places] | None = None) -> None:
        self.buffer = buffer
        self.views = blocks.views(buffer)
        self._digest = prepared(blocks.words(buffer, places))

    def sums(self) -> Sums:
        """Of each tensor; waits for the device once."""
        return sums([self._digest()])


class Together:
    """Small pieces of one type that a rank holds, read again and again, here or where others of their kind lie. Raises
    `SyncError` naming a piece that ends inside a word."""

    def __init__(self, named: Sequence[tuple[str, Shard]]) -> None:
        self.pieces = [Piece.of(name, shard) for name, shard in named]
        self._packed: Packed | None = None
        if named:
            first = named[0][1].tensor
            blocks = Blocks([shard.tensor.shape for _, shard in named], first.dtype)
            places = [_in_words(name, shard) for name, shard in named]
            self._packed = Packed(blocks, blocks.new_buffer(first.device), places)

    def digests(self, named: Sequence[tuple[str, Shard]]) -> list[int]:
        """Of what these hold now."""
        if self._packed is None:
            return []
        copy_all(self._packed.views, [shard.tensor for _, shard in named])
        return self._packed.sums().digests


def _in_words(name: str, shard: Shard) -> Places:
    places, size = Places.of(name, shard), shard.tensor.element_size()
    if tuple(shard.tensor.shape) == shard.shape:
        num_words = -(-places.length * size // _WORD_BYTES)
        return Places(name, 0, num_words, num_words)
    borders = [value * size for value in (places.first, places.length, places.stride)]
    if any(border % _WORD_BYTES for border in borders):
        raise SyncError(
            f"{name}: a rank's {list(shard.tensor.shape)} of {list(shard.shape)} ends inside a word of the digest "
            f"({_WORD_BYTES} bytes); set bridge.name to restart, which merges the adapter"
        )
    return Places(name, *(border // _WORD_BYTES for border in borders))


def copy_all(targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
    """Many small tensors in few kernels; one by one, a GPU would wait for Python."""
    if targets:
        torch._foreach_copy_(list(targets), list(sources))  # pyright: ignore[reportPrivateImportUsage]
