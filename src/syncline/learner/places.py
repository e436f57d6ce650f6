"""Which piece of a parameter this rank holds, where its gradient is whole, and how pieces become wholes again.

A parameter of a model nobody split is its own whole, so the optimizer, checkpoints and bridges ask here and need not
know how a model was split. Split linear layers and all that FSDP shards are torch's DTensors, which say so themselves;
the rest is noted on the parameter by who split it.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from syncline.bridges.manifest import Shard
from syncline.bridges.ranks import Ranks


class Gradient(StrEnum):
    OWN = "own"
    """Complete on this rank."""
    SUMMED = "summed"
    """Each rank that holds the piece has seen a part: norms inside of attention, key heads that ranks share."""
    EQUAL = "equal"
    """Every rank computes the same; made equal to the bit, so that copies never drift apart."""


@dataclass(frozen=True, slots=True)
class Place:
    """Of a parameter of `shape`, from the element `start` on, one index a dimension."""

    shape: tuple[int, ...]
    start: tuple[int, ...]
    gradient: Gradient = Gradient.OWN
    counted: bool = True
    """`False`: another rank holds the same piece and counts it in norms and digests."""


def set_place(parameter: Tensor, place: Place) -> None:
    parameter.place = place  # pyright: ignore[reportAttributeAccessIssue]


def place_of(parameter: Tensor) -> Place:
    """The whole, unless a split says otherwise."""
    if isinstance(parameter, DTensor):
        return _place_of_dtensor(parameter)
    shape = tuple(parameter.shape)
    return getattr(parameter, "place", None) or Place(shape, (0,) * len(shape))


def _place_of_dtensor(parameter: DTensor) -> Place:
    """Parts are equal but the last ones, which have what is left, or nothing (`torch.chunk`)."""
    mesh, [placement] = parameter.device_mesh, parameter.placements
    rank, start = mesh.get_local_rank(), [0] * parameter.ndim
    if not placement.is_shard():
        return Place(tuple(parameter.shape), tuple(start), Gradient.EQUAL, counted=rank == 0)
    size = parameter.shape[placement.dim]  # pyright: ignore[reportAttributeAccessIssue]
    start[placement.dim] = min(rank * -(-size // mesh.size()), size)  # pyright: ignore[reportAttributeAccessIssue]
    return Place(tuple(parameter.shape), tuple(start))


def local(parameter: Tensor) -> Tensor:
    """The tensor that holds this rank's piece: written in place, or with its `.data` rebound, it changes the model.

    `DTensor.to_local` would do for writing, but answers a tensor of its own, whose rebinding nobody sees.
    """
    return parameter._local_tensor if isinstance(parameter, DTensor) else parameter


def gathered(parameter: Tensor) -> Tensor:
    """A sharded parameter's whole, on every rank; all must ask together. A whole one as it is."""
    if not isinstance(parameter, DTensor):
        return parameter
    return parameter.detach().full_tensor()  # pyright: ignore[reportAttributeAccessIssue]


def local_gradient(gradient: Tensor, parameter: Tensor) -> Tensor:
    """What this rank computed of a parameter's gradient."""
    if not isinstance(gradient, DTensor):
        return gradient
    assert isinstance(parameter, DTensor), "a plain parameter has a plain gradient"
    if gradient.placements == parameter.placements:
        return gradient.to_local()
    return gradient.redistribute(placements=parameter.placements).to_local()


def shard(parameter: Tensor) -> Shard:
    place = place_of(parameter)
    return Shard(local(parameter), place.shape, place.start, place.counted)


def complete_gradients(gradients: Iterable[tuple[Place, Tensor]], ranks: Ranks) -> None:
    """Makes every gradient whole, in place, with one message. All ranks must hand in the same parameters, in order."""
    shared = [(place, gradient) for place, gradient in gradients if place.gradient is not Gradient.OWN]
    if ranks.world_size == 1 or not shared:
        return
    wholes = [_whole_with(gradient, place).div_(_divisor(place, ranks)) for place, gradient in shared]
    summed = ranks.sum_(torch.cat([whole.flatten() for whole in wholes])).split([whole.numel() for whole in wholes])
    for (place, gradient), whole in zip(shared, summed, strict=True):
        gradient.copy_(cut(whole.view(place.shape), place, gradient.shape))


def _divisor(place: Place, ranks: Ranks) -> int:
    return ranks.world_size if place.gradient is Gradient.EQUAL else 1


def _whole_with(gradient: Tensor, place: Place) -> Tensor:
    whole = torch.zeros(place.shape, dtype=torch.float32, device=gradient.device)
    cut(whole, place, gradient.shape).copy_(gradient)
    return whole


def cut(whole: Tensor, place: Place | Shard, shape: Sequence[int]) -> Tensor:
    """The view of a whole that a piece with this local shape is. Raises `ValueError` for a whole of another shape."""
    if tuple(whole.shape) != place.shape:
        raise ValueError(f"a tensor of shape {list(whole.shape)} where {list(place.shape)} was expected")
    for dimension, (start, length) in enumerate(zip(place.start, shape, strict=True)):
        whole = whole.narrow(dimension, start, length)
    return whole


def wholes(shards: Iterable[tuple[str, Shard]], ranks: Ranks) -> Iterator[tuple[str, Tensor]]:
    """Every parameter's whole, on every rank, one at a time; all ranks must ask together, to the end.

    Without other ranks these are the parameters' own tensors. Bits are moved, never added: -0.0 stays -0.0.
    """
    if ranks.world_size == 1:
        yield from ((name, shard.tensor.detach()) for name, shard in shards)
        return
    shards = list(shards)
    places = ranks.gathered([(s.start, tuple(s.tensor.shape), s.counted) for _, s in shards])
    for i, (name, own) in enumerate(shards):
        whole = torch.empty(own.shape, dtype=own.tensor.dtype, device=own.tensor.device)
        for rank, (start, shape, counted) in enumerate(place[i] for place in places):
            if counted:
                part = own.tensor.detach().contiguous() if rank == ranks.rank else whole.new_empty(shape)
                ranks.broadcast_(part, source=rank)
                cut(whole, Place(own.shape, start), shape).copy_(part)
        yield name, whole
