"""The digests of `digest.py` in one pass over a GPU's memory: torch ops alone would pass over it twenty times.

One launch serves many pieces. Each program digests one block of one run of one piece; a table on the device says which
piece that is, where it lies, how its runs are placed in the whole and what is not finite. The table outlives the
launch: as long as the pieces stay where they are, another measurement is another launch and nothing else.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

if TYPE_CHECKING:
    from syncline.bridges.digest import Words

BLOCK, WARPS = 1024, 2
"""Words of a program, and its warps: sixteen words a thread."""
COLUMNS = 10


@triton.jit
def _mixed_sums(pieces, table, found, num_pieces, sample, columns: tl.constexpr, block: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    row = table + tl.load(pieces + program).to(tl.int64) * columns
    words = tl.load(row).to(tl.pointer_type(sample.dtype.element_ty))
    first, length, stride = tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)
    blocks_per_run, first_program, piece = tl.load(row + 4), tl.load(row + 5), tl.load(row + 6)
    exponent, carry, sign = tl.load(row + 7), tl.load(row + 8), tl.load(row + 9)
    run = (program - first_program) // blocks_per_run
    column = ((program - first_program) % blocks_per_run) * block + tl.arange(0, block)
    inside = column < length
    bits = tl.load(words + run * length + column, mask=inside, other=0).to(tl.int64)
    broken = inside & ((~(((bits & exponent) ^ exponent) + carry) & sign) != 0)
    position = (first + run * stride + column).to(tl.uint64, bitcast=True)
    x = bits.to(tl.uint64, bitcast=True) ^ (position * 0x9E3779B97F4A7C15)
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    x = (x ^ (x >> 31)).to(tl.int64, bitcast=True)
    # nobody reads the sums before the kernel has ended, so no program waits for another's
    tl.atomic_add(found + piece, tl.sum(tl.where(inside, x, 0), axis=0), sem="relaxed")
    tl.atomic_add(found + num_pieces + piece, tl.sum(broken.to(tl.int64), axis=0), sem="relaxed")


class Launch:
    """Flat integer words on one GPU, with their places; a call answers what `digest.Digest` says and waits for nothing.

    A piece's words are runs of `length`: word j of run i has the position `first + i * stride + j`. Only addresses are
    kept: whoever calls must know that the words still lie there.
    """

    def __init__(self, batch: "Sequence[Words]") -> None:
        self._device = batch[0].bits.device
        self._num_pieces = len(batch)
        by_dtype: defaultdict[torch.dtype, list[int]] = defaultdict(list)
        for index, words in enumerate(batch):
            if words.bits.numel():
                by_dtype[words.bits.dtype].append(index)
        self._launches = [(dtype, *_table(batch, indices)) for dtype, indices in by_dtype.items()]
        self._samples = {dtype: torch.empty(1, dtype=dtype, device=self._device) for dtype in by_dtype}

    def __call__(self) -> torch.Tensor:
        found = torch.zeros(2, self._num_pieces, dtype=torch.int64, device=self._device)
        with torch.cuda.device(self._device):  # Triton launches on the current one
            for dtype, table, pieces in self._launches:
                arguments = (pieces, table, found, self._num_pieces, self._samples[dtype])
                _mixed_sums[(len(pieces),)](*arguments, columns=COLUMNS, block=BLOCK, num_warps=WARPS)  # pyright: ignore
        return found


def _table(batch: "Sequence[Words]", indices: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """`[pieces, COLUMNS]`, and the row of it that each program reads: `[programs]`."""
    device = batch[0].bits.device
    rows: list[tuple[int, ...]] = []
    counts = [0]
    for index in indices:
        bits, places, lanes = batch[index]
        blocks_per_run = triton.cdiv(places.length, BLOCK)
        where = (bits.data_ptr(), places.first, places.length, places.stride, blocks_per_run, counts[-1], index)
        rows.append((*where, lanes.exponent, lanes.carry, lanes.sign))
        counts.append(counts[-1] + bits.numel() // places.length * blocks_per_run)
    table = torch.tensor(rows, dtype=torch.int64).to(device)
    num_programs = torch.tensor(counts, dtype=torch.int64).diff().to(device)
    row = torch.arange(len(indices), dtype=torch.int32, device=device)
    return table, torch.repeat_interleave(row, num_programs, output_size=counts[-1])
