"""AdamW's moments: in float32, or in 8 bits with a scale for each block of a row (Dettmers et al., arXiv 2110.02861).

The 8-bit code and its rounding are torchao's. What does not fill whole blocks, and what is small, stays in float32.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from syncline.config.eight_bits import block_of
from syncline.errors import ConfigError
from syncline.learner.flat import joined, parts, spread


@dataclass(frozen=True, slots=True)
class Moment:
    values: Tensor
    """float32, or 8-bit codes."""
    scales: Tensor | None = None
    """Of codes: a row of them for each row."""
    block: int | None = None
    """Codes that share a scale."""
    signed: bool = True

    def state(self, name: str) -> dict[str, Tensor]:
        return {name: self.values} | ({} if self.scales is None else {f"{name}_scales": self.scales})


def moment_of(shape: torch.Size, device: torch.device, kind: str, *, signed: bool, whole: Sequence[int] = ()) -> Moment:
    """Zeros, for all or some rows of a `whole`, whose size decides: pieces are kept alike, however many there are.

    Raises `ConfigError` when 8 bits are asked for without torchao.
    """
    quantizer = None if kind == "float32" else _quantizer()
    block = block_of(whole or shape)
    if quantizer is None or block is None:
        return Moment(torch.zeros(shape, device=device))
    codes = torch.full(shape, quantizer.zero(signed), dtype=torch.uint8, device=device)
    return Moment(codes, torch.zeros((shape[0], shape[1:].numel() // block), device=device), block, signed)


@contextmanager
def in_float32(moments: Sequence[Moment], rows: Sequence[slice]) -> Iterator[list[Tensor]]:
    """Some rows of each, flat; what is written to them is kept at the end. All have the same block and sign."""
    values = [rows_of(moment.values, own) for moment, own in zip(moments, rows, strict=True)]
    block = moments[0].block
    if block is None:
        yield [value.view(-1) for value in values]
        return
    scales = [moment.scales[own] for moment, own in zip(moments, rows, strict=True) if moment.scales is not None]
    quantizer = _quantizer()
    code = quantizer.map(moments[0].signed, values[0].device)
    decoded = quantizer.torchao.dequant_with_qmap(joined(values), code, joined(scales))
    yield parts(decoded, values)
    codes, scale = quantizer.encoded(decoded, code, block)
    spread(codes, values)
    spread(scale, scales)


def rows_of(tensor: Tensor, rows: slice) -> Tensor:
    """A view; a scalar is its own row."""
    return tensor[rows] if tensor.ndim else tensor.unsqueeze(0)


@dataclass(frozen=True, slots=True)
class _Quantizer:
    torchao: Any

    def map(self, signed: bool, device: torch.device) -> Tensor:
        return _map(self.torchao, signed, device)

    def zero(self, signed: bool) -> int:
        """The code of 0."""
        return sorted(self.torchao.create_dynamic_map(signed)).index(0)

    def encoded(self, values: Tensor, map: Tensor, block: int) -> tuple[Tensor, Tensor]:
        encode = _compiled(self._encoded) if values.is_cuda else self._encoded
        return encode(values, map, block)

    def _encoded(self, values: Tensor, map: Tensor, block: int) -> tuple[Tensor, Tensor]:
        scaled, scales = self.torchao.scale_tensor(values, block)
        return self.torchao.quantize_8bit_with_qmap(scaled, map), scales


@cache
def _map(torchao: Any, signed: bool, device: torch.device) -> Tensor:
    """Made once: a step copies nothing to the GPU."""
    return torch.tensor(torchao.create_dynamic_map(signed), device=device)


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """A binary search of eight steps in one kernel, where torch alone would launch forty."""
    return torch.compile(function, dynamic=True)


@cache
def _quantizer() -> _Quantizer:
    try:
        from torchao.optim import quant_utils  # pyright: ignore[reportMissingImports]  (optional)
    except ImportError as error:
        fault = f"'int8' needs the package torchao ({error}); pip install torchao, or set it to float32"
        raise ConfigError([f"learner.optimizer.moments: {fault}"]) from error
    return _Quantizer(quant_utils)
