"""AdamW that does not lose small updates on bfloat16 weights, at 2 bytes a weight instead of a second copy in float32.

A bfloat16 weight keeps the upper 16 bits of its float32 master, rounded to the nearest; the signed remainder lives
beside it in 16 bits (`low_bits`). A step joins the two, runs torch's own AdamW on the float32 master and splits it
again, exactly. The weight's storage is written in place and never replaced: another process may be reading it.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from syncline.bridges.ranks import ONE_RANK, Ranks
from syncline.config.eight_bits import BLOCKS, SMALLEST
from syncline.config.schema import Optimizer
from syncline.errors import CheckpointError, TrainingError
from syncline.learner.flat import joined, parts, spread
from syncline.learner.moments import Moment, in_float32, moment_of, rows_of
from syncline.learner.places import Place, complete_gradients, local, local_gradient, place_of

log = logging.getLogger("syncline.optim")

CHUNK_ELEMENTS = 1 << 24
"""Elements stepped at a time: float32 masters (64 MiB) and what else a step computes exist for these only."""


def accumulate_fp32(model: nn.Module) -> list[RemovableHandle]:
    """Makes every backward add the gradient of each trainable bfloat16 parameter into a float32 `parameter.main_grad`.

    The parameter's own `.grad` is freed at once, so micro-batches add up without rounding to bfloat16 each time.
    """
    trained = [p for p in model.parameters() if p.requires_grad and p.dtype == torch.bfloat16]
    for parameter in trained:
        parameter.main_grad = None  # type: ignore[attr-defined]
    return [parameter.register_post_accumulate_grad_hook(_move_to_main_grad) for parameter in trained]


def _move_to_main_grad(parameter: Tensor) -> None:
    gradient, parameter.grad = parameter.grad, None
    if gradient is None:
        return
    gradient = local_gradient(gradient, parameter)
    main_grad = parameter.main_grad  # type: ignore[attr-defined]
    if main_grad is None:
        parameter.main_grad = gradient.float()  # type: ignore[attr-defined]
    else:
        main_grad.add_(gradient)


def join_master(upper: Tensor, low_bits: Tensor) -> Tensor:
    """The float32 master of bfloat16 weights: `(bits << 16) + low_bits`."""
    return ((upper.view(torch.int16).to(torch.int32) << 16) + low_bits).view(torch.float32)


def split_master(master: Tensor, upper: Tensor, low_bits: Tensor) -> None:
    """Writes a float32 master into a bfloat16 weight and its low bits, in place.

    Halves round away from zero; the remainder then lies in [-32768, 32767] and `join_master` gives the master back bit
    by bit.
    """
    bits = master.view(torch.int32)
    rounded = (bits + 0x8000) >> 16
    upper.view(torch.int16).copy_(rounded)
    low_bits.copy_(bits - (rounded << 16))


@dataclass(frozen=True, slots=True)
class _Slot:
    """One parameter and its state: this rank's piece. Vectors and scalars (norms, biases) are not decayed."""

    name: str
    parameter: nn.Parameter
    place: Place
    exp_avg: Moment
    exp_avg_sq: Moment
    low_bits: Tensor | None
    weight_decay: float
    rate_factor: float

    @property
    def kind(self) -> tuple[bool, int | None, float, float]:
        """Of what one batch is."""
        return self.low_bits is None, self.exp_avg.block, self.weight_decay, self.rate_factor

    @property
    def gradient(self) -> Tensor | None:
        main_grad = getattr(self.parameter, "main_grad", None)
        if main_grad is not None or self.parameter.grad is None:
            return main_grad
        return local_gradient(self.parameter.grad, self.parameter)

    def free_gradient(self) -> None:
        self.parameter.grad = None
        if hasattr(self.parameter, "main_grad"):
            self.parameter.main_grad = None  # type: ignore[attr-defined]

    def state(self) -> dict[str, Tensor]:
        low_bits = {} if self.low_bits is None else {"low_bits": self.low_bits}
        return self.exp_avg.state("exp_avg") | self.exp_avg_sq.state("exp_avg_sq") | low_bits


_Graded = tuple[_Slot, Tensor]
"""A parameter, and what this rank has of its gradient."""


@dataclass(frozen=True, slots=True)
class _Piece:
    """Rows of a parameter."""

    slot: _Slot
    gradient: Tensor
    rows: slice

    @property
    def size(self) -> int:
        return self.of(self.gradient).numel()

    def of(self, tensor: Tensor) -> Tensor:
        return rows_of(tensor, self.rows)


class SplitMasterAdamW:
    """AdamW over named parameters, float32 or bfloat16, and over this rank's piece of each where ranks share a model.

    Decoupled weight decay (arXiv 1711.05101), global norm clipping: the norm is of the whole model's gradient.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        config: Optimizer,
        *,
        ranks: Ranks = ONE_RANK,
        rate_factors: Callable[[str], float] = lambda name: 1.0,
    ) -> None:
        """`rate_factors`: a parameter's share of the learning rate, by its name."""
        self._config = config
        self._ranks = ranks
        self._slots = [_slot(name, p, config, rate_factors(name)) for name, p in named_parameters if p.requires_grad]
        self._num_steps = 0
        if not self._slots:
            raise ValueError("the optimizer got no trainable parameter")
        if config.moments == "int8":
            _tell_what_stays_float32(self._slots)

    @torch.no_grad()
    def step(self, learning_rate: float) -> float:
        """Applies the gathered gradients and frees them; returns their norm before clipping.

        A parameter without a gradient is left alone (the step count of bias correction is one for all). Raises
        `TrainingError` naming the first parameter whose gradient is not finite, and `ValueError` if there is no
        gradient at all; nothing is changed then.
        """
        graded = [(slot, gradient) for slot in self._slots if (gradient := slot.gradient) is not None]
        complete_gradients(((slot.place, gradient) for slot, gradient in graded), self._ranks)
        norm = _global_norm(graded, self._ranks)
        limit = self._config.max_grad_norm
        clip = 1.0 if limit is None else min(1.0, limit / (norm + 1e-6))
        self._num_steps += 1
        self._update(graded, learning_rate=learning_rate, clip=clip)
        for slot, _ in graded:
            slot.free_gradient()
        return norm

    @contextmanager
    def stepping_in_backward(self, learning_rate: float) -> Iterator[list[Tensor]]:
        """A backward pass inside of it, the step's last, steps each parameter once its gradient is whole, and frees it.

        Yields a list that fills with the squared norms of the gradients. A gradient that is not finite raises
        `TrainingError` naming its parameter at the end, when all have moved, for nothing waits for the device before:
        the run must end there.
        """
        self._num_steps += 1
        squares: list[Tensor] = []
        stepped: list[str] = []
        names = {id(slot.parameter): slot for slot in self._slots}
        hooks = [
            slot.parameter.register_post_accumulate_grad_hook(
                lambda parameter: self._step_now(names[id(parameter)], learning_rate, squares, stepped)
            )
            for slot in self._slots
        ]
        try:
            yield squares
            for slot in self._slots:  # what got its gradient without autograd, as a head's `main_grad`
                self._step_now(slot, learning_rate, squares, stepped)
            on_host = torch.stack(squares).tolist() if squares else []
            if bad := [name for name, square in zip(stepped, on_host, strict=True) if not isfinite(square)]:
                raise TrainingError(f"the gradient is not finite in parameter {bad[0]!r}; the step was applied")
        finally:
            for hook in hooks:
                hook.remove()

    @torch.no_grad()
    def _step_now(self, slot: _Slot, learning_rate: float, squares: list[Tensor], stepped: list[str]) -> None:
        gradient = slot.gradient
        if gradient is None:
            return
        squares.append(torch.linalg.vector_norm(gradient, dtype=torch.float32).square())
        stepped.append(slot.name)
        self._update([(slot, gradient)], learning_rate=learning_rate, clip=1.0)
        slot.free_gradient()

    def state_dict(self) -> dict[str, Tensor]:
        """Flat, as safetensors wants it: `<parameter>.exp_avg`, `.exp_avg_sq`, `.low_bits` and `num_steps`.

        Not copied.
        """
        state = {f"{slot.name}.{kind}": tensor for slot in self._slots for kind, tensor in slot.state().items()}
        return state | {"num_steps": torch.tensor(self._num_steps)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restores `state_dict`, in place.

        Raises `CheckpointError` naming what does not fit; nothing is changed then.
        """
        own = self.state_dict()
        for name in sorted(own.keys() | state.keys()):
            if name not in state or name not in own:
                raise CheckpointError(f"optimizer state {name!r} is {'missing' if name in own else 'of no parameter'}")
            if (own[name].shape, own[name].dtype) != (state[name].shape, state[name].dtype):
                raise CheckpointError(
                    f"optimizer state {name!r} is {state[name].dtype} {tuple(state[name].shape)} in the checkpoint, "
                    f"{own[name].dtype} {tuple(own[name].shape)} in the run"
                )
        for name, tensor in own.items():
            tensor.copy_(state[name])
        self._num_steps = int(state["num_steps"])

    def _update(self, graded: Sequence[_Graded], *, learning_rate: float, clip: float) -> None:
        kinds: dict[Any, list[_Graded]] = {}
        for slot, gradient in graded:
            kinds.setdefault(slot.kind, []).append((slot, gradient))
        count = torch.full((), float(self._num_steps), device=graded[0][1].device)
        for (_, _, weight_decay, rate_factor), alike in kinds.items():
            options = {"lr": learning_rate * rate_factor, "weight_decay": weight_decay, "eps": self._config.eps}
            for pieces in _batches(alike):
                self._update_batch(pieces, count, clip=clip, options=options)

    def _update_batch(self, pieces: Sequence[_Piece], count: Tensor, *, clip: float, options: dict[str, Any]) -> None:
        """At most `CHUNK_ELEMENTS`, or a row: their masters, scaled gradients and decoded moments exist at once."""
        weights = [piece.of(local(piece.slot.parameter).detach()) for piece in pieces]
        low_bits = [piece.of(piece.slot.low_bits) for piece in pieces if piece.slot.low_bits is not None]
        upper, low = joined(weights), joined(low_bits) if low_bits else None
        master = upper if low is None else join_master(upper, low)
        slots, rows = [piece.slot for piece in pieces], [piece.rows for piece in pieces]
        with (
            in_float32([slot.exp_avg for slot in slots], rows) as exp_avgs,
            in_float32([slot.exp_avg_sq for slot in slots], rows) as exp_avg_sqs,
        ):
            torch._fused_adamw_(  # pyright: ignore[reportPrivateImportUsage]
                parts(master, weights),
                _scaled([piece.of(piece.gradient) for piece in pieces], clip),
                exp_avgs,
                exp_avg_sqs,
                [],
                [count] * len(pieces),
                beta1=self._config.betas[0],
                beta2=self._config.betas[1],
                amsgrad=False,
                maximize=False,
                **options,
            )
        if low is not None:
            split_master(master, upper, low)
            spread(low, low_bits)
        spread(upper, weights)


def _slot(name: str, parameter: nn.Parameter, config: Optimizer, rate_factor: float) -> _Slot:
    if parameter.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"parameter {name!r} is {parameter.dtype}; the optimizer takes float32 and bfloat16")
    shape, device, place = local(parameter).shape, parameter.device, place_of(parameter)
    return _Slot(
        name=name,
        parameter=parameter,
        place=place,
        exp_avg=moment_of(shape, device, config.moments, signed=True, whole=place.shape),
        exp_avg_sq=moment_of(shape, device, config.moments, signed=False, whole=place.shape),
        low_bits=torch.zeros(shape, dtype=torch.int16, device=device) if parameter.dtype == torch.bfloat16 else None,
        weight_decay=config.weight_decay if parameter.ndim >= 2 else 0.0,
        rate_factor=rate_factor,
    )


def _tell_what_stays_float32(slots: Sequence[_Slot]) -> None:
    whole = [slot for slot in slots if slot.exp_avg.block is None]
    size, everything = (sum(slot.parameter.numel() for slot in some) for some in (whole, slots))
    log.info(
        "moments in float32, not int8: %.2f %% of what is trained, %d of %d parameters (vectors, below %d elements, or "
        "rows no multiple of %d)", 100 * size / everything, len(whole), len(slots), SMALLEST, BLOCKS[-1],
    )  # fmt: skip


def _global_norm(graded: list[tuple[_Slot, Tensor]], ranks: Ranks) -> float:
    """Over every element of the whole model once, whichever rank has it."""
    if not graded:
        raise ValueError("no parameter has a gradient")
    gradients = [gradient for _, gradient in graded]
    norms = torch.stack(torch._foreach_norm(gradients, dtype=torch.float32))  # pyright: ignore[reportPrivateImportUsage]
    counted = torch.tensor([slot.place.counted for slot, _ in graded], device=norms.device)
    norms = ranks.stacked(norms.where(counted, 0.0))
    norm = torch.linalg.vector_norm(norms)
    if not norm.isfinite():
        finite = norms.isfinite().all(0).tolist()
        bad = [slot.name for (slot, _), good in zip(graded, finite, strict=True) if not good]
        where = (
            f"in parameter {bad[0]!r} ({len(bad)} of {len(graded)} parameters)" if bad else "in the sum over parameters"
        )
        raise TrainingError(f"the gradient is not finite {where}; the step was not applied")
    return norm.item()


def _scaled(gradients: Sequence[Tensor], clip: float) -> list[Tensor]:
    """In float32, flat and contiguous."""
    if all(gradient.dtype == torch.float32 for gradient in gradients):
        flat = [gradient.contiguous().view(-1) for gradient in gradients]
    else:
        flat = parts(joined(gradients).float(), gradients)
    return flat if clip == 1.0 else list(torch._foreach_mul(flat, clip))  # pyright: ignore[reportPrivateImportUsage]


def _batches(graded: Sequence[_Graded]) -> Iterator[list[_Piece]]:
    """Small parameters together, large ones a few rows at a time; each is a tensor of its own to AdamW."""
    batch: list[_Piece] = []
    room = CHUNK_ELEMENTS
    for slot, gradient in graded:
        for rows in _chunks(gradient):
            piece = _Piece(slot, gradient, rows)
            if batch and piece.size > room:
                yield batch
                batch, room = [], CHUNK_ELEMENTS
            batch.append(piece)
            room -= piece.size
    if batch:
        yield batch


def _chunks(tensor: Tensor) -> Iterator[slice]:
    """A few rows at a time. AdamW works element by element: the split changes nothing."""
    num_rows = tensor.shape[0] if tensor.ndim else 1
    rows = max(1, CHUNK_ELEMENTS * num_rows // max(1, tensor.numel()))
    return (slice(start, min(start + rows, num_rows)) for start in range(0, num_rows, rows))
