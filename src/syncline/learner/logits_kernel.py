"""The sums of `logits.py` on a GPU, each in one pass over a tile: torch ops would read and write it a dozen times."""

from typing import TYPE_CHECKING

# pyright: reportArgumentType=false, reportCallIssue=false
import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from syncline.learner.logits import Scaling, Statistics

BLOCK = 2048


@triton.jit
def _scaled(raw, softcap, inverse_temperature, capped: tl.constexpr):
    logits = raw.to(tl.float32)
    if capped:
        logits = softcap * (2 * tl.sigmoid(2 * logits / softcap) - 1)  # tanh
    return logits * inverse_temperature


@triton.jit
def _fold(
    raw, stride, width, columns, maxima, sums, weighted_sums, label_logits, softcap, inverse_temperature,
    capped: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """A program a row."""
    row = tl.program_id(0).to(tl.int64)
    raw += row * stride
    maximum, total, weighted = tl.load(maxima + row), tl.load(sums + row), tl.load(weighted_sums + row)
    for start in range(0, width, block):
        column = start + tl.arange(0, block)
        inside = column < width
        logits = _scaled(tl.load(raw + column, mask=inside, other=0), softcap, inverse_temperature, capped)
        highest = tl.maximum(maximum, tl.max(tl.where(inside, logits, float("-inf")), axis=0))
        exp = tl.where(inside, tl.exp(logits - highest), 0.0)
        rescale = tl.exp(maximum - highest)
        total = total * rescale + tl.sum(exp, axis=0)
        weighted = weighted * rescale + tl.sum(exp * logits, axis=0)
        maximum = highest
    tl.store(maxima + row, maximum)
    tl.store(sums + row, total)
    tl.store(weighted_sums + row, weighted)
    label = tl.load(columns + row)
    if (label >= 0) & (label < width):
        tl.store(label_logits + row, _scaled(tl.load(raw + label), softcap, inverse_temperature, capped))


@triton.jit
def _to_gradient(
    raw, stride, width, columns, log_normalisers, gradients, softcap, inverse_temperature,
    capped: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """A program a block of a row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * block + tl.arange(0, block)
    inside = column < width
    raw += row * stride + column
    logits = _scaled(tl.load(raw, mask=inside, other=0), softcap, inverse_temperature, capped)
    gradient = tl.load(gradients + row)
    is_label = (column == tl.load(columns + row)).to(tl.float32)
    result = gradient * (is_label - tl.exp(logits - tl.load(log_normalisers + row))) * inverse_temperature
    if capped:
        tanh = logits / (softcap * inverse_temperature)
        result = result * (1 - tanh * tanh)
    tl.store(raw, result.to(raw.dtype.element_ty), mask=inside)


def fold(statistics: "Statistics", raw: Tensor, columns: Tensor, scaling: "Scaling") -> None:
    rows, width = raw.shape
    kept = (statistics.maximum, statistics.sum_exp, statistics.weighted_sum, statistics.label_logit)
    with torch.cuda.device(raw.device):  # Triton launches on the current one
        _fold[(rows,)](raw, raw.stride(0), width, columns, *kept, *_scalars(scaling), block=BLOCK)


def to_gradient_(raw: Tensor, columns: Tensor, log_normaliser: Tensor, *, gradient: Tensor, scaling: "Scaling") -> None:
    rows, width = raw.shape
    grid = (rows, triton.cdiv(width, BLOCK))
    with torch.cuda.device(raw.device):
        _to_gradient[grid](
            raw, raw.stride(0), width, columns, log_normaliser, gradient, *_scalars(scaling), block=BLOCK
        )  # fmt: skip


def _scalars(scaling: "Scaling") -> tuple[float, float, bool]:
    return scaling.softcap or 1.0, 1 / scaling.temperature, scaling.softcap is not None
