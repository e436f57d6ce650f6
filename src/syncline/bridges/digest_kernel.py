"""The digests of `digest.py` in one pass over a GPU's memory: torch ops alone would pass over it twenty times.

One launch serves many pieces. Each program digests one block of one run of one piece; a table on the device says which
piece that is, where it lies and how its runs are placed in the whole.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

if TYPE_CHECKING:
    from syncline.bridges.digest import Words

BLOCK = 4096


@triton.jit
def _mixed_sums(pieces, table, totals, sample, block: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    piece = tl.load(pieces + program).to(tl.int64)
    row = table + piece * 6
    words = tl.load(row).to(tl.pointer_type(sample.dtype.element_ty))
    first, length, stride = tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)
    blocks_per_run, first_program = tl.load(row + 4), tl.load(row + 5)
    run = (program - first_program) // blocks_per_run
    column = ((program - first_program) % blocks_per_run) * block + tl.arange(0, block)
    inside = column < length
    word = tl.load(words + run * length + column, mask=inside, other=0).to(tl.int64).to(tl.uint64, bitcast=True)
    position = (first + run * stride + column).to(tl.uint64, bitcast=True)
    x = word ^ (position * 0x9E3779B97F4A7C15)
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    x = (x ^ (x >> 31)).to(tl.int64, bitcast=True)
    tl.atomic_add(totals + piece, tl.sum(tl.where(inside, x, 0), axis=0))


def mixed_sums(batch: "Sequence[Words]") -> torch.Tensor:
    """Flat integer words on one GPU, with their places, to their digests `[len(batch)]` int64. Waits for nothing.

    A piece's words are runs of `length`: word j of run i has the position `first + i * stride + j`.
    """
    totals = torch.zeros(len(batch), dtype=torch.int64, device=batch[0][0].device)
    by_dtype: defaultdict[torch.dtype, list[int]] = defaultdict(list)
    for index, (words, _) in enumerate(batch):
        if words.numel():
            by_dtype[words.dtype].append(index)
    for indices in by_dtype.values():
        totals[indices] = _launch([batch[index] for index in indices])
    return totals


def _launch(batch: "Sequence[Words]") -> torch.Tensor:
    device = batch[0][0].device
    rows: list[tuple[int, ...]] = []
    counts: list[int] = []
    for words, places in batch:
        blocks_per_run = triton.cdiv(places.length, BLOCK)
        row = (words.data_ptr(), places.first, places.length, places.stride, blocks_per_run, sum(counts[-1:]))
        rows.append(row)
        counts.append(row[-1] + words.numel() // places.length * blocks_per_run)
    table = torch.tensor(rows, dtype=torch.int64).to(device)
    num_programs = torch.tensor(counts, dtype=torch.int64).diff(prepend=torch.zeros(1, dtype=torch.int64)).to(device)
    index = torch.arange(len(batch), dtype=torch.int32, device=device)
    pieces = torch.repeat_interleave(index, num_programs, output_size=counts[-1])
    totals = torch.zeros(len(batch), dtype=torch.int64, device=device)
    with torch.cuda.device(device):  # Triton launches on the current one
        _mixed_sums[(counts[-1],)](pieces, table, totals, batch[0][0], block=BLOCK)  # pyright: ignore
    return totals
