"""The gradients of a plain language model head and of its input, added up from tiles of the logits' gradient."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from syncline.learner.vocabulary import Vocabulary


@dataclass(slots=True)
class HeadGradients:
    """Of hidden states, head's weight and bias, as tiles of logits' gradients add to them; `None`: not asked for."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    direct: bool
    """`weight` is the parameter's `main_grad` itself."""

    @classmethod
    def of(cls, needed: tuple[bool, ...], hidden: Tensor, weight: Any, bias: Tensor | None) -> "HeadGradients":
        total, direct = torch.promote_types(hidden.dtype, torch.float32), needed[1] and hasattr(weight, "main_grad")
        return cls(
            hidden=torch.zeros_like(hidden, dtype=total) if needed[0] else None,
            weight=_sum_of(weight, direct, total) if needed[1] else None,
            bias=torch.zeros_like(bias, dtype=total) if bias is not None and needed[2] else None,
            direct=direct,
        )

    def add(self, tile: Tensor, rows: slice, columns: slice, *, hidden: Tensor, weight: Tensor) -> None:
        """`tile` `[n, m]` of rows of `hidden` and of the columns that are `weight`'s rows."""
        if self.hidden is not None:
            _add_product(self.hidden[rows], tile, weight)
        if self.weight is not None:
            _add_product(self.weight[columns], tile.t(), hidden[rows])
        if self.bias is not None:
            self.bias[columns] += tile.sum(0, dtype=self.bias.dtype)

    def rounded(self, vocabulary: Vocabulary, dtype: torch.dtype) -> tuple[Tensor | None, ...]:
        """What autograd is to have of them."""
        if self.hidden is not None:
            vocabulary.ranks.sum_(self.hidden)
        sums = (self.hidden, None if self.direct else self.weight, self.bias)
        return tuple(None if value is None else value.to(dtype) for value in sums)


def _sum_of(parameter: Any, direct: bool, dtype: torch.dtype) -> Tensor:
    """Where the weight's gradient adds up: its `main_grad`, or float32 zeros of our own."""
    if not direct:
        return torch.zeros_like(parameter, dtype=dtype)
    if parameter.main_grad is None:
        parameter.main_grad = torch.zeros_like(parameter, dtype=dtype)
    return parameter.main_grad


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """`total += a @ b`, the product never rounded to the type of `a` and `b`."""
    if total.is_cuda and total.dtype != a.dtype:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))
