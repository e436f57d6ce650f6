"""A kernel that knows no sinks computes attention with them, in value and in every gradient."""

import torch

from syncline.learner.attention import packed_attention
from syncline.learner.sinks import Kernel, SinkAttention

TOKENS, HEADS, WIDTH, SCALE = 9, 3, 8, 0.4


def scores(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """`[H, T, T]`, causal."""
    plain = torch.einsum("qhd,khd->hqk", query, key) * SCALE
    return plain.masked_fill(torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1), float("-inf"))


def forward(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple:
    lse = scores(query, key).logsumexp(-1)
    return torch.einsum("hqk,khd->qhd", (scores(query, key) - lse[..., None]).exp(), value), lse, "kept"


def backward(grad, query, key, value, out, lse, rest) -> tuple:
    """As FlashAttention does it (arXiv 2307.08691, algorithm 2): of the forward pass it knows `out` and `lse` alone."""
    assert rest == "kept"
    p = (scores(query, key) - lse[..., None]).exp()
    delta = (grad * out).sum(-1).T[..., None]
    ds = p * (torch.einsum("qhd,khd->hqk", grad, value) - delta) * SCALE
    return (
        torch.einsum("hqk,khd->qhd", ds, key),
        torch.einsum("hqk,qhd->khd", ds, query),
        torch.einsum("hqk,qhd->khd", p, grad),
    )


def test_values_and_gradients_are_those_of_the_softmax_with_one_more_score() -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(TOKENS, HEADS, WIDTH, requires_grad=True) for _ in range(3)]
    sinks = torch.randn(HEADS, requires_grad=True)
    pull = torch.randn(TOKENS, HEADS, WIDTH)
    ours = SinkAttention.apply(*inputs, sinks, Kernel(forward, backward))
    borders = torch.tensor([0, TOKENS], dtype=torch.int32)
    told = {"cu_seq_lens_q": borders, "max_length_q": TOKENS, "scaling": SCALE, "s_aux": sinks}
    theirs, _ = packed_attention(torch.nn.Identity(), *(x.transpose(0, 1)[None] for x in inputs), None, **told)
    torch.testing.assert_close(ours, theirs[0])
    found, expected = (torch.autograd.grad((out * pull).sum(), [*inputs, sinks]) for out in (ours, theirs[0]))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
