"""Weights an engine keeps in a packing of its kernels' own: named apart, because no learner has them.

The engine tells their digests as it measures them; the learner takes those of the first engine it proves as given, and
from then on they are part of the model's digest like any other. That they come from the learner's checkpoint the
engine shows by the digests of what its loader was handed.
"""

PREFIX = "repacked:"


def is_repacked(name: str) -> bool:
    return name.startswith(PREFIX)
