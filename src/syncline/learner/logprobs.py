"""Log-probabilities of sampled tokens from hidden states, a few rows of logits at a time.

A row of logits is as long as the vocabulary, so all of a micro-batch's at once would outweigh the model. Each chunk's
are computed, reduced to two numbers a token and dropped; the backward pass computes them again. This is an autograd
function and not `torch.utils.checkpoint` because that would add up the head's gradient over the chunks in the head's
own type: here it adds up in float32 and is rounded once.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from syncline.learner.vocabulary import Vocabulary


@dataclass(frozen=True, slots=True)
class _Projection:
    """The language model head and what turns its output into the sampler's logits."""

    head: nn.Module
    temperature: float
    chunk_rows: int
    softcap: float | None
    vocabulary: Vocabulary

    def chunks(self, num_rows: int) -> Iterator[slice]:
        return (slice(i, min(i + self.chunk_rows, num_rows)) for i in range(0, num_rows, self.chunk_rows))

    def logits(self, raw: Tensor) -> Tensor:
        """Head output to float32 logits, softcap then temperature."""
        logits = raw.float()
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits / self.temperature

    def raw_gradient(self, logits: Tensor, logits_gradient: Tensor) -> Tensor:
        """The chain rule of `logits`, from its result."""
        gradient = logits_gradient / self.temperature
        if self.softcap is not None:
            gradient = gradient * (1 - (logits * (self.temperature / self.softcap)).square())
        return gradient


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
    twice, so it may not draw dropout: `ValueError`. At most `chunk` rows of logits exist at once. A head split by rows
    of the vocabulary maps to this rank's columns; the logits of two ranks never meet.
    """
    for name, module in head.named_modules():
        if isinstance(module, nn.Dropout) and module.training and module.p > 0:
            raise ValueError(f"dropout {module.p} in the language model head ({name or 'itself'}): set it to 0")
    projection = _Projection(head, temperature, chunk, softcap, Vocabulary.of(head))
    trainable = [parameter for parameter in head.parameters() if parameter.requires_grad]
    return _TokenLogprobs.apply(hidden, labels, projection, *trainable)  # type: ignore[return-value]


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, labels: Tensor, projection: _Projection, *trainable: Tensor) -> Any:
        shape = (3, len(labels))
        log_normaliser, label_logits, mean = torch.empty(shape, dtype=torch.float32, device=hidden.device)
        for rows in projection.chunks(len(labels)):
            logits = projection.logits(projection.head(hidden[rows]))
            log_normaliser[rows] = logits.logsumexp(-1)
            label_logits[rows] = projection.vocabulary.select(logits, labels[rows])
            mean[rows] = (logits.softmax(-1) * logits).sum(-1)
        log_normaliser, logprobs, entropy = projection.vocabulary.normalised(log_normaliser, label_logits, mean)
        ctx.save_for_backward(hidden, labels, log_normaliser, *trainable)
        ctx.projection = projection
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden, labels, log_normaliser, *trainable = ctx.saved_tensors
        projection: _Projection = ctx.projection
        hidden_gradient = torch.empty_like(hidden)
        sums = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in trainable]
        for rows in projection.chunks(len(labels)):
            with torch.enable_grad():
                chunk = hidden[rows].detach().requires_grad_()
                raw = projection.head(chunk)
            logits = projection.logits(raw.detach())
            logits_gradient = _logits_gradient(
                projection.vocabulary, logits, log_normaliser[rows], labels=labels[rows], gradient=gradients[0][rows]
            )
            raw_gradient = projection.raw_gradient(logits, logits_gradient).to(raw.dtype)
            chunk_gradient, *parts = torch.autograd.grad(raw, [chunk, *trainable], raw_gradient)
            hidden_gradient[rows] = chunk_gradient
            for total, part in zip(sums, parts, strict=True):
                total += part
        projection.vocabulary.ranks.sum_(hidden_gradient)
        rounded = [total.to(parameter.dtype) for total, parameter in zip(sums, trainable, strict=True)]
        return hidden_gradient, None, None, *rounded


def _logits_gradient(
    vocabulary: Vocabulary, logits: Tensor, log_normaliser: Tensor, *, labels: Tensor, gradient: Tensor
) -> Tensor:
    """d logprob / d logits = onehot(label) - softmax(logits), times each row's gradient."""
    logits_gradient = (logits - log_normaliser[:, None]).exp_().mul_(-gradient[:, None])
    vocabulary.add_at_labels(logits_gradient, labels, gradient)
    return logits_gradient
