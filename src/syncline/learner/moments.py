"""AdamW's moments: in float32, or in 8 bits with a scale for each block of 256 (Dettmers et al., arXiv 2110.02861).

The 8-bit code and its rounding are torchao's. What does not fill whole blocks, and what is small, stays in float32.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

from syncline.errors import ConfigError

BLOCK = 256
SMALLEST = 4096
"""Elements a tensor has at least to be worth it."""


class Moment(Protocol):
    def rows(self, rows: slice) -> AbstractContextManager[Tensor]:
        """Some rows of it in float32, contiguous. What is written to them is kept at the end."""
        ...

    def state(self, name: str) -> dict[str, Tensor]: ...


def moment_of(shape: torch.Size, device: torch.device, kind: str, *, signed: bool, whole: Sequence[int] = ()) -> Moment:
    """Zeros, for all or some rows of a `whole`, whose size decides: pieces are kept alike, however many there are.

    Raises `ConfigError` when 8 bits are asked for without torchao.
    """
    if kind == "float32":
        return _Float32(torch.zeros(shape, device=device))
    quantizer = _quantizer()
    if len(shape) < 2 or math.prod(whole or shape) < SMALLEST or math.prod(shape[1:]) % BLOCK:
        return _Float32(torch.zeros(shape, device=device))
    codes = torch.full(shape, quantizer.zero(signed), dtype=torch.uint8, device=device)
    scales = torch.zeros((shape[0], math.prod(shape[1:]) // BLOCK), device=device)
    return _Int8(codes, scales, quantizer.map(signed, device), quantizer)


@dataclass(frozen=True, slots=True)
class _Float32:
    values: Tensor

    @contextmanager
    def rows(self, rows: slice) -> Iterator[Tensor]:
        view = self.values[rows] if self.values.ndim else self.values.unsqueeze(0)
        yield view

    def state(self, name: str) -> dict[str, Tensor]:
        return {name: self.values}


@dataclass(frozen=True, slots=True)
class _Int8:
    codes: Tensor
    scales: Tensor
    """A row of them for each row of `codes`."""
    map: Tensor
    quantizer: "_Quantizer"

    @contextmanager
    def rows(self, rows: slice) -> Iterator[Tensor]:
        codes, scales = self.codes[rows], self.scales[rows]
        values = self.quantizer.decoded(codes, self.map, scales)
        yield values
        self.quantizer.encode(values, self.map, codes, scales)

    def state(self, name: str) -> dict[str, Tensor]:
        return {name: self.codes, f"{name}_scales": self.scales}


@dataclass(frozen=True, slots=True)
class _Quantizer:
    torchao: Any

    def map(self, signed: bool, device: torch.device) -> Tensor:
        return torch.tensor(self.torchao.create_dynamic_map(signed), device=device)

    def zero(self, signed: bool) -> int:
        """The code of 0."""
        return sorted(self.torchao.create_dynamic_map(signed)).index(0)

    def decoded(self, codes: Tensor, map: Tensor, scales: Tensor) -> Tensor:
        return self.torchao.dequant_with_qmap(codes, map, scales.flatten())

    def encode(self, values: Tensor, map: Tensor, codes: Tensor, scales: Tensor) -> None:
        encoded = _compiled(self._encoded) if values.is_cuda else self._encoded
        found, scale = encoded(values.flatten(), map)
        codes.copy_(found.view(codes.shape))
        scales.copy_(scale.view(scales.shape))

    def _encoded(self, values: Tensor, map: Tensor) -> tuple[Tensor, Tensor]:
        scaled, scales = self.torchao.scale_tensor(values, BLOCK)
        return self.torchao.quantize_8bit_with_qmap(scaled, map), scales


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
