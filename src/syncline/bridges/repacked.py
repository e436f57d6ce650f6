"""Weights an engine keeps in a packing of its kernels' own: named apart, because no learner has them.

The engine tells their digests as it measures them; the learner takes those of the first engine it proves as given, and
from then on they are part of the model's digest like any other. That they come from the learner's checkpoint the
engine shows by the digests of what its loader was handed.
"""

from collections.abc import Iterable

PREFIX = "repacked:"
_OF_PACKED_LAYERS = frozenset({"qweight", "weight_packed", "weight_scale", "weight_scale_inv"})
"""A tensor that no layer has unless it is packed: GPTQ's and AWQ's, compressed-tensors', FP8's by blocks."""


def is_repacked(name: str) -> bool:
    return name.startswith(PREFIX)


def packed_layers(names: Iterable[str]) -> frozenset[str]:
    """The layers that a checkpoint with tensors of these names holds packed."""
    parts = (name.rpartition(".") for name in names)
    return frozenset(layer for layer, _, leaf in parts if leaf in _OF_PACKED_LAYERS)
