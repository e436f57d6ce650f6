"""Many tensors side by side in one buffer, digested in one pass: a launch for each would cost more than the reading.

Every tensor starts at a block's boundary and its last block is filled with zeros. A word of the digest is eight bytes
of the row-major bits of the whole tensor, the last one filled with zeros, so a piece of a tensor must begin and end
between words; then the pieces' digests add up to the whole's, as in `receipt.py`.
"""

import math
from collections.abc import Sequence

import torch

from syncline.bridges.digest import Places, mixed_words
from syncline.bridges.manifest import Shard
from syncline.bridges.receipt import Piece
from syncline.errors import SyncError

_BLOCK_WORDS = 512
_CHUNK_BLOCKS = 1 << 14
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
        self._num_blocks = [-(-words // _BLOCK_WORDS) for words in self.num_words]
        self.buffer_words = sum(self._num_blocks) * _BLOCK_WORDS

    def new_buffer(self, device: torch.device) -> torch.Tensor:
        """`[buffer_words]` int64, zeros."""
        return torch.zeros(self.buffer_words, dtype=torch.int64, device=device)

    def views(self, buffer: torch.Tensor) -> list[torch.Tensor]:
        """Each tensor as a view of the buffer."""
        elements = buffer.view(self.dtype)
        views, start = [], 0
        for shape, blocks in zip(self.shapes, self._num_blocks, strict=True):
            views.append(elements[start : start + math.prod(shape)].view(shape))
            start += blocks * _BLOCK_WORDS * _WORD_BYTES // self.dtype.itemsize
        return views

    def digests(self, buffer: torch.Tensor, places: Sequence[Places] | None = None) -> list[int]:
        """One number a tensor, modulo 2**64; waits for the device once. `places`: in words, of tensors that are pieces
        of others."""
        device = buffer.device
        counts, sizes = (torch.tensor(numbers, device=device) for numbers in (self._num_blocks, self.num_words))
        total = sum(self._num_blocks)
        owner = torch.repeat_interleave(torch.arange(len(counts), device=device), counts, output_size=total)
        first = (torch.arange(total, device=device) - (counts.cumsum(0) - counts)[owner]) * _BLOCK_WORDS
        words, within = buffer.view(-1, _BLOCK_WORDS), torch.arange(_BLOCK_WORDS, device=device)
        runs = (
            torch.tensor([[p.first, p.length, p.stride - p.length] for p in places], device=device) if places else None
        )
        sums = torch.zeros(len(counts), dtype=torch.int64, device=device)
        for start in range(0, total, _CHUNK_BLOCKS):
            chunk = slice(start, start + _CHUNK_BLOCKS)
            index = first[chunk, None] + within
            position = index if runs is None else _placed(index, runs[owner[chunk]])
            mixed = mixed_words(words[chunk], position)
            mixed.masked_fill_(index >= sizes[owner[chunk], None], 0)
            sums.index_add_(0, owner[chunk], mixed.sum(1))
        return [value % (1 << 64) for value in sums.tolist()]


def _placed(index: torch.Tensor, runs: torch.Tensor) -> torch.Tensor:
    """`[blocks, words]`: positions in the wholes. `runs`: first word, length and gap of each block's tensor."""
    first, length, gap = runs[:, :, None].unbind(1)
    return first + index + index // length * gap


def digested(named: Sequence[tuple[str, Shard]]) -> list[tuple[Piece, int]]:
    """What `receipt.combined` asks of a rank, of many small pieces of one type; the words are this module's.

    Raises `SyncError` naming a piece that ends inside a word.
    """
    if not named:
        return []
    shards = [shard for _, shard in named]
    blocks = Blocks([shard.tensor.shape for shard in shards], shards[0].tensor.dtype)
    buffer = blocks.new_buffer(shards[0].tensor.device)
    copy_all(blocks.views(buffer), [shard.tensor for shard in shards])
    values = blocks.digests(buffer, [_in_words(name, shard) for name, shard in named])
    return [(Piece.of(name, shard), value) for (name, shard), value in zip(named, values, strict=True)]


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
    torch._foreach_copy_(list(targets), list(sources))  # pyright: ignore[reportPrivateImportUsage]
