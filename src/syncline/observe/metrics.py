"""Metrics that know how their values are joined: the caller says it, the name never does."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum


class Reduction(StrEnum):
    """How the values of one name become one number."""

    MEAN = "mean"
    """Weighted: the sum of value * weight over the sum of the weights."""
    SUM = "sum"
    MIN = "min"
    MAX = "max"
    LAST = "last"


@dataclass(slots=True)
class _Series:
    reduction: Reduction
    value: float
    weight: float


class Metrics:
    """Collects the values of one step: `add` many times, `reduced` once."""

    def __init__(self) -> None:
        self._series: dict[str, _Series] = {}

    def add(self, name: str, value: float, *, weight: float = 1.0, reduction: Reduction = Reduction.MEAN) -> None:
        """Joins `value` to what `name` holds. Raises `ValueError` when `name` was given another reduction."""
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(f"metric {name!r}: weight must be finite and >= 0, got {weight}")
        if reduction is not Reduction.MEAN and weight != 1.0:
            raise ValueError(f"metric {name!r}: only a mean takes a weight, and this is a {reduction}")
        held = self._series.get(name)
        if held is None:
            self._series[name] = _Series(reduction, value * weight, weight)
            return
        if held.reduction is not reduction:
            raise ValueError(f"metric {name!r} is a {held.reduction} already, and cannot be a {reduction} too")
        held.value = _joined(held.value, value * weight, reduction)
        held.weight += weight

    def update(self, values: Mapping[str, float], *, reduction: Reduction = Reduction.MEAN) -> None:
        """Adds every value of a mapping under one reduction."""
        for name, value in values.items():
            self.add(name, value, reduction=reduction)

    def reduced(self) -> dict[str, float]:
        """One number a name. A mean whose weights are all zero measured nothing and is left out."""
        return {
            name: series.value / series.weight if series.reduction is Reduction.MEAN else series.value
            for name, series in self._series.items()
            if series.weight > 0
        }


def _joined(held: float, value: float, reduction: Reduction) -> float:
    match reduction:
        case Reduction.MEAN | Reduction.SUM:
            return held + value
        case Reduction.MIN:
            return min(held, value)
        case Reduction.MAX:
            return max(held, value)
        case Reduction.LAST:
            return value
