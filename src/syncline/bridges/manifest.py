"""What a checkpoint parameter is on one rank: which piece of it, and where it lies."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Shard:
    """One rank's piece of a checkpoint parameter; without tensor parallelism, the whole."""

    tensor: torch.Tensor
    """The piece: a view of the very memory that is read in the forward pass."""
    shape: tuple[int, ...]
    """Of the whole parameter, as the checkpoint has it."""
    start: tuple[int, ...]
    """Index of the piece's first element in the whole, one a dimension."""
    counted: bool = True
    """`False`: another rank holds the same piece and counts it in the digest."""
