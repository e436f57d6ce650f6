"""Attention with learned sinks on a GPU: a FlashAttention that knows none, and the sink put in afterwards, exactly.

A sink s is one more score in a head's softmax, of a key whose value is nothing. With the scores' log-sum-exp L, which
FlashAttention gives beside its output o, the output is o · σ(L − s). The backward pass of FlashAttention rebuilds its
probabilities from the scores and L, and needs of the output only Δ = ⟨o, do⟩; given log(exp L + exp s) and the output
with the sink in their places it computes the gradients of the attention with the sink. That of s itself is −p Δ, summed
over the queries, with p = σ(s − L) (GPT-OSS, arXiv 2508.10925, section 2.2; FlashAttention-2, arXiv 2307.08691, §3.1).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Kernel:
    """A FlashAttention in two halves."""

    forward: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Any]]
    """`(query, key, value)`, `[T, H, D]` each, to (output `[T, H, D]`, log-sum-exp `[H, T]` float32, anything)."""
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    """`(grad, query, key, value, output, log-sum-exp, anything)` to the gradients of query, key and value."""


class SinkAttention(torch.autograd.Function):
    """`apply(query, key, value, sinks [H], kernel)` → `[T, H, D]`."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor, kernel: Kernel) -> Tensor:
        plain, lse, rest = kernel.forward(query, key, value)
        column = sinks.float()[:, None]
        out = (plain.float() * torch.sigmoid(lse - column).T.unsqueeze(-1)).to(plain.dtype)
        total = torch.logaddexp(lse, column)
        ctx.save_for_backward(query, key, value, sinks, out, total)
        ctx.kernel, ctx.rest = kernel, rest
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
        query, key, value, sinks, out, total = ctx.saved_tensors
        [grad] = grads
        dq, dk, dv = ctx.kernel.backward(grad.contiguous(), query, key, value, out, total, ctx.rest)
        delta = (grad.float() * out.float()).sum(-1)  # [T, H]
        share = torch.exp(sinks.float()[:, None] - total)  # [H, T]
        return dq, dk, dv, -(share * delta.T).sum(-1).to(sinks.dtype), None


def attention_with_sinks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor,
    borders: Tensor,
    longest: int,
    *,
    window: int | None,
    scale: float | None,
) -> Tensor:
    """`query` [1, Hq, T, D], `key` and `value` [1, Hkv, T, D], `sinks` [Hq] to [1, T, Hq, D]; by torch's own
    FlashAttention, or whichever `attention_choice` put in its place."""
    kernel = _torch_kernel(borders, longest, window=window, scale=scale)
    out: Any = SinkAttention.apply(*(x[0].transpose(0, 1) for x in (query, key, value)), sinks, kernel)
    return out.unsqueeze(0)


def _torch_kernel(borders: Tensor, longest: int, *, window: int | None, scale: float | None) -> Kernel:
    aten = torch.ops.aten
    told = (borders, borders, longest, longest, 0.0)  # no dropout
    left = -1 if window is None else window - 1
    how: dict[str, Any] = {"scale": scale, "window_size_left": left, "window_size_right": 0}

    def forward(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Any]:
        out, lse, state, unused, _ = aten._flash_attention_forward(
            query, key, value, *told, window is None, False, **how
        )
        return out, lse, (state, unused)

    def backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, rest: Any) -> Any:
        return aten._flash_attention_backward(
            grad, query, key, value, out, lse.contiguous(), *told, window is None, *rest, **how
        )

    return Kernel(forward, backward)
