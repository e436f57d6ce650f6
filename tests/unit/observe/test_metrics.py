"""Reductions with numbers worked by hand."""

import pytest

from syncline.observe.metrics import Metrics, Reduction


@pytest.mark.parametrize(
    ("reduction", "expected"),
    [(Reduction.MEAN, 3.0), (Reduction.SUM, 9.0), (Reduction.MIN, 1.0), (Reduction.MAX, 6.0), (Reduction.LAST, 2.0)],
)
def test_reductions(reduction: Reduction, expected: float) -> None:
    metrics = Metrics()
    for value in (1.0, 6.0, 2.0):
        metrics.add("loss_max", value, reduction=reduction)
    assert metrics.reduced() == {"loss_max": expected}, "the reduction is the caller's, whatever the name says"


def test_a_mean_is_weighted() -> None:
    metrics = Metrics()
    metrics.add("kl", 0.5, weight=300)
    metrics.add("kl", 0.1, weight=100)
    assert metrics.reduced()["kl"] == pytest.approx(0.4)


def test_a_mean_over_nothing_is_left_out() -> None:
    metrics = Metrics()
    metrics.add("kl", 0.0, weight=0)
    metrics.add("reward", 1.0)
    assert metrics.reduced() == {"reward": 1.0}


def test_update_adds_each_value() -> None:
    metrics = Metrics()
    metrics.update({"a": 1.0, "b": 2.0}, reduction=Reduction.SUM)
    metrics.update({"a": 3.0}, reduction=Reduction.SUM)
    assert metrics.reduced() == {"a": 4.0, "b": 2.0}


def test_one_name_has_one_reduction() -> None:
    metrics = Metrics()
    metrics.add("tokens", 1.0, reduction=Reduction.SUM)
    with pytest.raises(ValueError, match="'tokens' is a sum already, and cannot be a mean too"):
        metrics.add("tokens", 1.0)


def test_only_a_mean_takes_a_weight() -> None:
    with pytest.raises(ValueError, match="only a mean takes a weight"):
        Metrics().add("tokens", 1.0, weight=2.0, reduction=Reduction.SUM)
    with pytest.raises(ValueError, match="weight must be finite and >= 0, got -1"):
        Metrics().add("tokens", 1.0, weight=-1)
