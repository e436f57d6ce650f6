"""Measured again and again: what was prepared is used while it holds, and never once it does not."""

import math
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from syncline.bridges.manifest import Shard
from syncline.bridges.measure import LearnerDigests, Measure
from syncline.bridges.receipt import parameter_digests, whole
from syncline.errors import SyncError


class Naming:
    """Yields a model's parameters and counts how often it was asked to."""

    def __init__(self) -> None:
        self.num_times = 0
        self.adds = 0.0
        """Not zero: yields tensors made to be read once."""

    def __call__(self, model: nn.Module) -> Iterator[tuple[str, Shard]]:
        self.num_times += 1
        for name, parameter in model.named_parameters():
            yield name, whole(parameter + self.adds if self.adds else parameter)


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 7), nn.Linear(7, 5).bfloat16())


def test_parameters_that_stay_are_named_once_and_measured_each_time(model: nn.Module) -> None:
    naming = Naming()
    digests = LearnerDigests(naming)
    for _ in range(3):
        assert digests.of(model) == parameter_digests(model.named_parameters())
        with torch.no_grad():
            model[0].weight.mul_(2)
            model[1].bias.add_(1)
    assert naming.num_times == 2, "once to measure, once to prepare"


@pytest.mark.parametrize("how", ["its data", "the parameter"])
def test_a_parameter_that_moved_is_read_where_it_is(model: nn.Module, how: str) -> None:
    digests = LearnerDigests(Naming())
    digests.of(model)
    moved = torch.randn(7, 64)
    if how == "its data":
        model[0].weight.data = moved
    else:
        model[0].weight = nn.Parameter(moved)
    assert digests.of(model) == parameter_digests(model.named_parameters())


def test_what_was_made_to_be_read_once_is_made_anew(model: nn.Module) -> None:
    """A merged adapter: the model's own memory stays where it is, and what is exported of it does not."""
    naming = Naming()
    digests = LearnerDigests(naming)
    for naming.adds in (1.0, 2.0, 3.0):
        added = naming.adds
        assert digests.of(model) == parameter_digests((n, p + added) for n, p in model.named_parameters())


def test_a_view_that_is_no_contiguous_memory_is_not_taken_for_prepared() -> None:
    model = nn.Linear(64, 8)
    digests = LearnerDigests(lambda m: [("w", whole(m.weight.t()))])
    for _ in range(3):
        assert digests.of(model) == parameter_digests([("w", model.weight.t())])
        with torch.no_grad():
            model.weight.add_(1)


def test_weights_that_became_infinite_are_refused_by_name(model: nn.Module) -> None:
    digests = LearnerDigests(Naming())
    digests.of(model)
    with torch.no_grad():
        model[1].weight[3, 3] = math.inf
    for _ in range(2):
        with pytest.raises(SyncError, match=r"1\.weight is not finite \(1 of 4 parameters\); it is never published"):
            digests.of(model)


def test_a_reading_names_its_pieces_by_their_layout(model: nn.Module) -> None:
    measure = Measure(Naming())
    first = measure.read(model)
    assert first == measure.read(model)
    assert [piece.name for piece in measure.pieces] == ["0.weight", "0.bias", "1.weight", "1.bias"]
    model[0].weight = nn.Parameter(torch.ones(3, 64))
    assert measure.read(model).layout != first.layout
