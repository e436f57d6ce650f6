"""Which piece of a parameter this rank holds, where its gradient is whole, and how pieces become wholes again.

A parameter of a model nobody split is its own whole, so the optimizer, checkpoints and bridges ask here and need not
know how a model was split. Split linear layers are torch's DTensors, which say so themselves; the rest is noted on the
parameter by who split it.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from syncline.bridges.manifest import Shard
from syncline.learner.distributed import TENSOR_PARALLEL, Ranks


class Gradient(StrEnum):
    OWN = "own"
    """Complete on this rank."""
    SUMMED = "summed"
    """Each rank that holds the piece has seen a part: norms inside of attention, key heads that ranks share."""
    EQUAL = "equal"
    """Every rank computes the same; made equal to the bit, so that copies never drift apart."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Of a parameter of `shape`, from the element `start` on, one index a dimension."""

    shape: tuple[int, ...]
    start: tuple[int, ...]
    gradient: Gradient = Gradient.OWN
    counted: bool = True
    """`False`: another rank holds the same piece and counts it in norms and digests."""


def set_piece(parameter: Tensor, piece: Piece) -> None:
    parameter.piece = piece  # pyright: ignore[reportAttributeAccessIssue]


def piece_of(parameter: Tensor) -> Piece:
    """The whole, unless a split says otherwise."""
    if isinstance(parameter, DTensor):
        return _piece_of_dtensor(parameter)
    shape = tuple(parameter.shape)
    return getattr(parameter, "piece", None) or Piece(shape, (0,) * len(shape))


def _piece_of_dtensor(parameter: DTensor) -> Piece:
    mesh, [placement] = parameter.device_mesh, parameter.placements
    rank, start = mesh.get_local_rank(TENSOR_PARALLEL), [0] * parameter.ndim
    if not placement.is_shard():
        return Piece(tuple(parameter.shape), tuple(start), Gradient.EQUAL, counted=rank == 0)
    start[placement.dim] = rank * (parameter.shape[placement.dim] // mesh.size())  # pyright: ignore
    return Piece(tuple(parameter.shape), tuple(start))


def local(parameter: Tensor) -> Tensor:
    """This rank's memory of a parameter, to be read and written in place; no autograd."""
    with torch.no_grad():
        return parameter.to_local() if isinstance(parameter, DTensor) else parameter.detach()


def local_gradient(gradient: Tensor, parameter: Tensor) -> Tensor:
    """What this rank computed of a parameter's gradient."""
    if not isinstance(gradient, DTensor):
        return gradient
    assert isinstance(parameter, DTensor), "a plain parameter has a plain gradient"
    return gradient.redistribute(placements=parameter.placements).to_local()


def shard(parameter: Tensor) -> Shard:
    piece = piece_of(parameter)
    return Shard(local(parameter), piece.shape, piece.start, piece.counted)


def complete_gradients(gradients: Iterable[tuple[Piece, Tensor]], ranks: Ranks) -> None:
    """Makes every gradient whole, in place, with one message. All ranks must hand in the same parameters, in order."""
    shared = [(piece, gradient) for piece, gradient in gradients if piece.gradient is not Gradient.OWN]
    if ranks.world_size == 1 or not shared:
        return
    wholes = [_whole_with(gradient, piece).div_(_divisor(piece, ranks)) for piece, gradient in shared]
    summed = ranks.sum_(torch.cat([whole.flatten() for whole in wholes])).split([whole.numel() for whole in wholes])
    for (piece, gradient), whole in zip(shared, summed, strict=True):
        gradient.copy_(cut(whole.view(piece.shape), piece, gradient.shape))


def _divisor(piece: Piece, ranks: Ranks) -> int:
    return ranks.world_size if piece.gradient is Gradient.EQUAL else 1


def _whole_with(gradient: Tensor, piece: Piece) -> Tensor:
    whole = torch.zeros(piece.shape, dtype=torch.float32, device=gradient.device)
    cut(whole, piece, gradient.shape).copy_(gradient)
    return whole


def cut(whole: Tensor, piece: Piece | Shard, shape: Sequence[int]) -> Tensor:
    """The view of a whole that a piece with this local shape is. Raises `ValueError` for a whole of another shape."""
    if tuple(whole.shape) != piece.shape:
        raise ValueError(f"a tensor of shape {list(whole.shape)} where {list(piece.shape)} was expected")
    for dimension, (start, length) in enumerate(zip(piece.start, shape, strict=True)):
        whole = whole.narrow(dimension, start, length)
    return whole


def wholes(shards: Iterable[tuple[str, Shard]], ranks: Ranks) -> Iterator[tuple[str, Tensor]]:
    """Every parameter's whole, on every rank, one at a time; all ranks must ask together, to the end.

    Without other ranks these are the parameters' own tensors. Bits are moved, never added: -0.0 stays -0.0.
    """
    shards = list(shards)
    if ranks.world_size == 1:
        yield from ((name, shard.tensor) for name, shard in shards)
        return
    places = ranks.gathered([(s.start, tuple(s.tensor.shape), s.counted) for _, s in shards])
    for i, (name, own) in enumerate(shards):
        whole = torch.empty(own.shape, dtype=own.tensor.dtype, device=own.tensor.device)
        for rank, (start, shape, counted) in enumerate(place[i] for place in places):
            if counted:
                part = own.tensor.contiguous() if rank == ranks.rank else whole.new_empty(shape)
                ranks.broadcast_(part, source=rank)
                cut(whole, Piece(own.shape, start), shape).copy_(part)
        yield name, whole
