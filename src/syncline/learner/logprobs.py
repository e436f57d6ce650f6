"""Log-probabilities of sampled tokens from hidden states, a tile of logits at a time.

A row of logits is as long as the vocabulary, so all of a micro-batch's at once would outweigh the model. Each tile's
are computed, reduced to a few numbers a token and dropped; the backward pass computes them again and turns them into
their gradient where they lie. Where a token's part in the loss is known as soon as its own log-probability is
(`losses.splits_by_token`), that happens at once, and nothing is computed again: three products instead of four.

The head's gradient adds up in float32 and is rounded once, or not at all where the weight has a float32 `main_grad`
(`optim.accumulate_fp32`), to which it is added directly.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from syncline.learner.head_gradients import HeadGradients
from syncline.learner.logits import Scaling, Statistics, to_gradient_
from syncline.learner.vocabulary import Vocabulary

NARROWEST = 1024
"""Columns a tile has at least: narrower ones leave the matrix units idle."""

LossOf = Callable[[Tensor, slice], Tensor]
"""`(logprobs of some of the N tokens, which)` to the loss's part that is theirs, a scalar."""


def token_logprobs(
    hidden: Tensor, head: nn.Module, labels: Tensor, *, temperature: float, chunk: int, softcap: float | None = None
) -> tuple[Tensor, Tensor]:
    """`hidden` [N, H] and `labels` [N] to logprobs [N] float32, differentiable, and entropy [N] float32 in nats, which
    is not.

    Both are of the distribution sampled from: `softcap` (`final_logit_softcapping` of some models), then `temperature`.
    `head` maps `[n, H]` to `[n, V]`, a plain or an adapted layer; its trainable parameters get their gradients. It runs
    twice, so it may not draw dropout: `ValueError`. As many logits as `chunk` rows have exist at once: of an adapted
    head whole rows, of a plain one columns of many rows, so that its weight is read and its gradient written once. A
    head split by rows of the vocabulary maps to this rank's columns; the logits of two ranks never meet.
    """
    _refuse_dropout(head)
    scaling, vocabulary = Scaling(temperature, softcap), Vocabulary.of(head)
    if _is_plain(head):
        plain = _Plain(scaling, vocabulary, chunk)
        return _OfPlainHead.apply(hidden, labels, plain, head.weight, head.bias)  # type: ignore[return-value]
    trainable = [parameter for parameter in head.parameters() if parameter.requires_grad]
    adapted = _Adapted(scaling, vocabulary, chunk, head)
    return _OfAdaptedHead.apply(hidden, labels, adapted, *trainable)  # type: ignore[return-value]


def token_loss(
    hidden: Tensor,
    head: nn.Module,
    labels: Tensor,
    loss_of: LossOf,
    *,
    temperature: float,
    chunk: int,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, a scalar, and what `token_logprobs` gives, both not differentiable. For a loss that `loss_of` gives a
    chunk of tokens at a time.

    Gradients are made on the way forward, so the scalar must be what `backward` is called on, and a weight with a
    `main_grad` has its gradient already then. An adapted head is computed twice, as ever.
    """
    if not _is_plain(head):
        logprobs, entropy = token_logprobs(hidden, head, labels, temperature=temperature, chunk=chunk, softcap=softcap)
        return loss_of(logprobs, slice(0, len(labels))), logprobs.detach(), entropy
    plain = _Plain(Scaling(temperature, softcap), Vocabulary.of(head), chunk)
    return _LossOfPlainHead.apply(hidden, labels, plain, loss_of, head.weight, head.bias)  # type: ignore[return-value]


def _refuse_dropout(head: nn.Module) -> None:
    for name, module in head.named_modules():
        if isinstance(module, nn.Dropout) and module.training and module.p > 0:
            raise ValueError(f"dropout {module.p} in the language model head ({name or 'itself'}): set it to 0")


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
        plain: _Plain = ctx.plain
        needed = (ctx.needs_input_grad[0], *ctx.needs_input_grad[3:])
        sums = HeadGradients.of(needed, hidden, ctx.parameter, bias)
        for rows, columns in plain.tiles(len(labels), len(weight)):
            part = weight[columns]
            raw = _raw(hidden[rows], part, None if bias is None else bias[columns])
            placed = labels[rows] - (plain.vocabulary.start + columns.start)
            upstream = gradients[0][rows].contiguous()
            to_gradient_(raw, placed, log_normaliser[rows], gradient=upstream, scaling=plain.scaling)
            sums.add(raw, rows, columns, hidden=hidden, weight=part)
            del raw
        hidden_gradient, weight_gradient, bias_gradient = sums.rounded(plain.vocabulary, hidden.dtype)
        return hidden_gradient, None, None, weight_gradient, bias_gradient


class _LossOfPlainHead(torch.autograd.Function):
    """A chunk's logits become log-probabilities, these the chunk's loss, and that the logits' gradient in their place,
    of which two products make the gradients of hidden states and head (as liger-kernel does with cross entropy)."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, labels: Tensor, plain: _Plain, loss_of: LossOf, weight: Tensor, bias: Tensor | None
    ) -> Any:
        needed = (ctx.needs_input_grad[0], *ctx.needs_input_grad[4:])
        sums, every = HeadGradients.of(needed, hidden, weight, bias), slice(0, len(weight))
        loss = torch.zeros((), device=hidden.device)
        logprobs, entropy = hidden.new_empty(2, len(labels), dtype=torch.float32)
        for rows in _chunks(len(labels), plain.chunk):
            raw, placed = _raw(hidden[rows], weight, bias), labels[rows] - plain.vocabulary.start
            statistics = Statistics.empty(len(placed), hidden.device)
            statistics.fold(raw, placed, plain.scaling)
            log_normaliser, logprobs[rows], entropy[rows] = plain.vocabulary.normalised(
                statistics.log_normaliser, statistics.label_logit, statistics.mean
            )
            part, upstream = _differentiated(loss_of, logprobs[rows], rows)
            loss += part
            to_gradient_(raw, placed, log_normaliser, gradient=upstream, scaling=plain.scaling)
            sums.add(raw, rows, every, hidden=hidden, weight=weight)
            del raw  # before the next chunk's are made
        ctx.save_for_backward(*sums.rounded(plain.vocabulary, hidden.dtype))
        ctx.mark_non_differentiable(logprobs, entropy)
        return loss, logprobs, entropy

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        alone, said = gradients[0] == 1, "token_loss's scalar must be the one that backward() is called on"
        torch._assert_async(alone, said)  # pyright: ignore[reportPrivateImportUsage]
        hidden_gradient, weight_gradient, bias_gradient = ctx.saved_tensors
        return hidden_gradient, None, None, None, weight_gradient, bias_gradient


def _differentiated(loss_of: LossOf, logprobs: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
    """The loss of some tokens, and its gradient by their log-probabilities."""
    with torch.enable_grad():
        own = logprobs.detach().requires_grad_()
        loss = loss_of(own, rows)
        [gradient] = torch.autograd.grad(loss, own)
    return loss.detach(), gradient.contiguous()


def _chunks(num_rows: int, chunk: int) -> Iterator[slice]:
    return (slice(i, min(i + chunk, num_rows)) for i in range(0, num_rows, chunk))


def _raw(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.nn.functional.linear(hidden, weight, bias)


@dataclass(frozen=True, slots=True)
class _Adapted:
    scaling: Scaling
    vocabulary: Vocabulary
    chunk: int
    head: nn.Module


class _OfAdaptedHead(torch.autograd.Function):
    """Any module, by its own autograd. Not `torch.utils.checkpoint`, which would add up in the head's own type."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, labels: Tensor, adapted: _Adapted, *trainable: Tensor) -> Any:
        statistics = Statistics.empty(len(labels), hidden.device)
        for rows in _chunks(len(labels), adapted.chunk):
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
        for rows in _chunks(len(labels), adapted.chunk):
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
