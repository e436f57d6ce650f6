"""Which of AdamW's moments 8 bits hold (`learner.optimizer.moments: int8`), for whoever has no torch to ask."""

import math
from collections.abc import Sequence
from importlib.util import find_spec

from syncline.config.schema import RunConfig

BLOCKS = (256, 128, 64, 32, 16)
"""Elements that share a scale: the most that divide a row, so that rows can be stepped, cut and resumed apart."""
SMALLEST = 4096
"""Elements a tensor has at least to be worth it."""


def row_block(row: int) -> int | None:
    """Of rows of so many elements; `None`: they stay in float32."""
    return next((block for block in BLOCKS if row % block == 0), None)


def block_of(shape: Sequence[int]) -> int | None:
    """Of a whole parameter; `None` too for vectors, and for what is small."""
    worth = len(shape) >= 2 and math.prod(shape) >= SMALLEST
    return row_block(math.prod(shape[1:])) if worth else None


def bytes_per_element(row: int) -> float:
    """Of both moments."""
    block = row_block(row)
    return 8.0 if block is None else 2 * (1 + 4 / block)


def missing_torchao(config: RunConfig) -> list[str]:
    """A sentence when 8 bits are asked for and this Python lacks their code."""
    if config.learner.optimizer.moments == "float32" or find_spec("torchao"):
        return []
    return ["learner.optimizer.moments: 'int8' needs the package torchao; pip install torchao, or set it to float32"]
