"""What a tile of raw logits becomes, in place or in one pass: running statistics, and the gradient.

A tile is some rows (tokens) and some columns (vocabulary entries) of the head's output. On a GPU one Triton kernel each
does the work (`logits_kernel.py`); here are the same sums in torch, for everything else.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Scaling:
    """The head's output to the sampler's logits: softcap (`final_logit_softcapping` of some models), temperature."""

    temperature: float
    softcap: float | None = None

    def __call__(self, raw: Tensor) -> Tensor:
        logits = raw.float()
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits / self.temperature

    def raw_gradient(self, logits: Tensor, logits_gradient: Tensor) -> Tensor:
        """The chain rule of `__call__`, from its result."""
        gradient = logits_gradient / self.temperature
        if self.softcap is not None:
            gradient = gradient * (1 - (logits * (self.temperature / self.softcap)).square())
        return gradient


@dataclass(frozen=True, slots=True)
class Statistics:
    """Of N rows of logits, over the columns seen so far, each `[N]` float32 (online softmax, arXiv 1805.02867)."""

    maximum: Tensor
    sum_exp: Tensor
    """Of the exponentials of logits minus `maximum`."""
    weighted_sum: Tensor
    """Of the logits, weighted by the same exponentials."""
    label_logit: Tensor
    """0 until the label's column was seen."""

    @classmethod
    def empty(cls, num_rows: int, device: torch.device) -> "Statistics":
        maximum = torch.full((num_rows,), float("-inf"), device=device)
        return cls(maximum, *torch.zeros(3, num_rows, device=device))

    def rows(self, rows: slice) -> "Statistics":
        """Views of some rows."""
        return Statistics(self.maximum[rows], self.sum_exp[rows], self.weighted_sum[rows], self.label_logit[rows])

    @property
    def log_normaliser(self) -> Tensor:
        return self.maximum + self.sum_exp.log()

    @property
    def mean(self) -> Tensor:
        """The logits' mean under their softmax; 0 of no columns."""
        return self.weighted_sum / self.sum_exp.clamp(min=torch.finfo(torch.float32).tiny)

    def fold(self, raw: Tensor, columns: Tensor, scaling: Scaling) -> None:
        """Takes in a tile `[N, n]` of raw logits; `columns` `[N]` are the labels' in it, if they are in it at all."""
        if not raw.shape[1]:
            return
        if raw.is_cuda:
            from syncline.learner.logits_kernel import fold

            fold(self, raw, columns, scaling)
            return
        logits = scaling(raw)
        maximum = torch.maximum(self.maximum, logits.amax(-1))
        rescale, exp = (self.maximum - maximum).exp(), (logits - maximum[:, None]).exp()
        self.sum_exp.mul_(rescale).add_(exp.sum(-1))
        self.weighted_sum.mul_(rescale).add_((exp * logits).sum(-1))
        self.maximum.copy_(maximum)
        held = (columns >= 0) & (columns < raw.shape[1])
        label_logit = logits.gather(-1, columns.where(held, 0)[:, None]).squeeze(-1)
        self.label_logit.copy_(label_logit.where(held, self.label_logit))


def to_gradient_(raw: Tensor, columns: Tensor, log_normaliser: Tensor, *, gradient: Tensor, scaling: Scaling) -> None:
    """Turns a tile `[N, n]` of raw logits into the loss's gradient by it, in place.

    d logprob / d logits = onehot(label) - softmax(logits), times each row's `gradient` `[N]`.
    """
    if not raw.shape[1]:
        return
    if raw.is_cuda:
        from syncline.learner.logits_kernel import to_gradient_ as on_gpu

        on_gpu(raw, columns, log_normaliser, gradient=gradient, scaling=scaling)
        return
    logits = scaling(raw)
    logits_gradient = (logits - log_normaliser[:, None]).exp_().mul_(-gradient[:, None])
    held = (columns >= 0) & (columns < raw.shape[1])
    logits_gradient.scatter_add_(-1, columns.where(held, 0)[:, None], gradient.where(held, 0.0)[:, None])
    raw.copy_(scaling.raw_gradient(logits, logits_gradient))
