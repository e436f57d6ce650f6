"""Log-probabilities of sampled tokens from hidden states, a tile of logits at a time.

A row of logits is as long as the vocabulary, so all of a micro-batch's at once would outweigh the model. Each tile's
are computed, reduced to a few numbers a token and dropped; the backward pass computes them again and turns them into
their gradient where they lie. The head's gradient adds up in float32 and is rounded once, or not at all where the
weight has a float32 `main_grad` (`optim.accumulate_fp32`), to which it is added directly.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from syncline.learner.logits import Scaling, Statistics, to_gradient_
from syncline.learner.vocabulary import Vocabulary

NARROWEST = 1024
"""Columns a tile has at least: narrower ones leave the matrix units idle."""


def token_logprobs(
    hidden: Tensor,
    head: nn.Module,
    labels: Tensor,
    *,
    temperature: float,
    chunk: int,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """`hidden` [N, H] and `labels` [N] to logprobs [N] float32, differentiable, and entropy [N] float32 in nats, which
    is not.

    Both are of the distribution sampled from: `softcap` (`final_logit_softcapping` of some models), then `temperature`.
    `head` maps `[n, H]` to `[n, V]`, a plain or an adapted layer; its trainable parameters get their gradients. It runs
    twice, so it may not draw dropout: `ValueError`. As many logits as `chunk` rows have exist at once: of an adapted
    head whole rows, of a plain one columns of many rows, so that its weight is read and its gradient written once. A
    head split by rows of the vocabulary maps to this rank's columns; the logits of two ranks never meet.
    """
    for name, module in head.named_modules():
        if isinstance(module, nn.Dropout) and module.training and module.p > 0:
            raise ValueError(f"dropout {module.p} in the language model head ({name or 'itself'}): set it to 0")
    scaling, vocabulary = Scaling(temperature, softcap), Vocabulary.of(head)
    if _is_plain(head):
        plain = _Plain(scaling, vocabulary, chunk)
        return _OfPlainHead.apply(hidden, labels, plain, head.weight, head.bias)  # type: ignore[return-value]
    trainable = [parameter for parameter in head.parameters() if parameter.requires_grad]
    adapted = _Adapted(scaling, vocabulary, chunk, head)
    return _OfAdaptedHead.apply(hidden, labels, adapted, *trainable)  # type: ignore[return-value]


def _is_plain(head: nn.Module) -> bool:
    return type(head) is nn.Linear and not head._forward_hooks and not head._forward_pre_hooks


@dataclass(frozen=True, slots=True)
class _Plain:
    scaling: Scaling
    vocabulary: Vocabulary
    chunk: int

    def tiles(self, num_rows: int, width: int) -> Iterator[tuple[slice, slice]]:
        """Rows and columns of each; at most as many elements as `chunk` rows have."""
        elements = self.chunk * width
        rows = min(num_rows, max(self.chunk, elements // NARROWEST))
        columns = max(1, elements // max(1, rows))
        columns = columns // 128 * 128 or columns
        for first in range(0, num_rows, max(1, rows)):
            for start in range(0, width, columns):
                yield slice(first, min(first + rows, num_rows)), slice(start, min(start + columns, width))


class _OfPlainHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, labels: Tensor, plain: _Plain, weight: Tensor, bias: Tensor | None) -> Any:
        statistics = Statistics.empty(len(labels), hidden.device)
        for rows, columns in plain.tiles(len(labels), len(weight)):
            raw = _raw(hidden[rows], weight[columns], None if bias is None else bias[columns])
            placed = labels[rows] - (plain.vocabulary.start + columns.start)
            statistics.rows(rows).fold(raw, placed, plain.scaling)
            del raw  # before the next tile is made
        log_normaliser, logprobs, entropy = plain.vocabulary.normalised(
            statistics.log_normaliser, statistics.label_logit, statistics.mean
        )
        ctx.save_for_backward(hidden, labels, log_normaliser, weight, bias)
        ctx.plain = plain
        ctx.parameter = weight
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden, labels, log_normaliser, weight, bias = ctx.saved_tensors
        plain, total = ctx.plain, torch.promote_types(hidden.dtype, torch.float32)
        hidden_sum = torch.zeros_like(hidden, dtype=total) if ctx.needs_input_grad[0] else None
        direct = ctx.needs_input_grad[3] and hasattr(ctx.parameter, "main_grad")
        weight_sum = _sum_of(ctx.parameter, direct, total) if ctx.needs_input_grad[3] else None
        bias_sum = torch.zeros_like(bias, dtype=total) if bias is not None and ctx.needs_input_grad[4] else None
        for rows, columns in plain.tiles(len(labels), len(weight)):
            part = weight[columns]
            raw = _raw(hidden[rows], part, None if bias is None else bias[columns])
            placed = labels[rows] - (plain.vocabulary.start + columns.start)
            upstream = gradients[0][rows].contiguous()
            to_gradient_(raw, placed, log_normaliser[rows], gradient=upstream, scaling=plain.scaling)
            if hidden_sum is not None:
                _add_product(hidden_sum[rows], raw, part)
            if weight_sum is not None:
                _add_product(weight_sum[columns], raw.t(), hidden[rows])
            if bias_sum is not None:
                bias_sum[columns] += raw.sum(0, dtype=total)
            del raw
        if hidden_sum is not None:
            plain.vocabulary.ranks.sum_(hidden_sum)
        sums = (hidden_sum, None, None, None if direct else weight_sum, bias_sum)
        return tuple(None if value is None else value.to(hidden.dtype) for value in sums)


def _raw(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.nn.functional.linear(hidden, weight, bias)


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


@dataclass(frozen=True, slots=True)
class _Adapted:
    scaling: Scaling
    vocabulary: Vocabulary
    chunk: int
    head: nn.Module

    def chunks(self, num_rows: int) -> Iterator[slice]:
        return (slice(i, min(i + self.chunk, num_rows)) for i in range(0, num_rows, self.chunk))


class _OfAdaptedHead(torch.autograd.Function):
    """Any module, by its own autograd. Not `torch.utils.checkpoint`, which would add up in the head's own type."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, labels: Tensor, adapted: _Adapted, *trainable: Tensor) -> Any:
        statistics = Statistics.empty(len(labels), hidden.device)
        for rows in adapted.chunks(len(labels)):
            placed = labels[rows] - adapted.vocabulary.start
            statistics.rows(rows).fold(adapted.head(hidden[rows]), placed, adapted.scaling)
        log_normaliser, logprobs, entropy = adapted.vocabulary.normalised(
            statistics.log_normaliser, statistics.label_logit, statistics.mean
        )
        ctx.save_for_backward(hidden, labels, log_normaliser, *trainable)
        ctx.adapted = adapted
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden, labels, log_normaliser, *trainable = ctx.saved_tensors
        adapted: _Adapted = ctx.adapted
        hidden_gradient = torch.empty_like(hidden)
        sums = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in trainable]
        for rows in adapted.chunks(len(labels)):
            with torch.enable_grad():
                chunk = hidden[rows].detach().requires_grad_()
                raw = adapted.head(chunk)
            raw_gradient, placed = raw.detach().clone(), labels[rows] - adapted.vocabulary.start
            upstream = gradients[0][rows].contiguous()
            to_gradient_(raw_gradient, placed, log_normaliser[rows], gradient=upstream, scaling=adapted.scaling)
            chunk_gradient, *parts = torch.autograd.grad(raw, [chunk, *trainable], raw_gradient)
            hidden_gradient[rows] = chunk_gradient
            for total, part in zip(sums, parts, strict=True):
                total += part
        adapted.vocabulary.ranks.sum_(hidden_gradient)
        rounded = [total.to(parameter.dtype) for total, parameter in zip(sums, trainable, strict=True)]
        return hidden_gradient, None, None, *rounded
