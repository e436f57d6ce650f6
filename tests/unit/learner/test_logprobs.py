from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from syncline.learner import logprobs as logprobs_module
from syncline.learner.logprobs import token_logprobs, token_loss
from syncline.learner.optim import accumulate_fp32

N, H, V, CHUNK = 50, 8, 96, 16


class Adapted(nn.Module):
    """A frozen head with a low-rank adapter on it, as PEFT builds one."""

    def __init__(self) -> None:
        super().__init__()
        self.base_layer = nn.Linear(H, V, bias=False).requires_grad_(False)
        self.down, self.up = nn.Linear(H, 2, bias=False), nn.Linear(2, V, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.base_layer(hidden) + self.up(self.down(hidden))


class LargestTensor(TorchDispatchMode):
    """Sees the result of every operator, those of the backward pass too."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(x.numel() for x in tree_leaves(result) if isinstance(x, Tensor))])
        return result


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def problem() -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(N, H, requires_grad=True), torch.randint(V, (N,)), torch.randn(N)


def plain(hidden: Tensor, head: nn.Module, labels: Tensor, temperature: float, softcap: float | None) -> Any:
    logits = head(hidden).float()
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    distribution = torch.distributions.Categorical(logits=logits / temperature)
    return distribution.log_prob(labels), distribution.entropy()


def trainable(head: nn.Module) -> Iterator[Tensor]:
    return (parameter for parameter in head.parameters() if parameter.requires_grad)


@pytest.mark.parametrize(("temperature", "softcap"), [(1.0, None), (0.7, None), (1.3, 2.0)])
@pytest.mark.parametrize("head_type", ["plain", "bias", "adapted"])
def test_values_and_gradients_equal_the_plain_path(head_type: str, temperature: float, softcap: float | None) -> None:
    head = Adapted() if head_type == "adapted" else nn.Linear(H, V, bias=head_type == "bias")
    hidden, labels, upstream = problem()
    logprobs, entropy = token_logprobs(hidden, head, labels, temperature=temperature, chunk=CHUNK, softcap=softcap)
    expected, expected_entropy = plain(hidden, head, labels, temperature, softcap)
    torch.testing.assert_close(logprobs, expected)
    torch.testing.assert_close(entropy, expected_entropy)
    assert not entropy.requires_grad
    inputs = [hidden, *trainable(head)]
    gradients = torch.autograd.grad(logprobs, inputs, upstream)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, inputs, upstream))


def test_no_tensor_holds_more_than_a_chunk_of_logits() -> None:
    head = nn.Linear(H, V)
    hidden, labels, upstream = problem()
    with LargestTensor() as largest:
        token_logprobs(hidden, head, labels, temperature=1.0, chunk=CHUNK)[0].backward(upstream)
    assert largest.numel == CHUNK * V
    with LargestTensor() as largest:
        plain(hidden, head, labels, 1.0, None)[0].backward(upstream)
    assert largest.numel == N * V


class Products(TorchDispatchMode):
    """Counts the multiplications of matrix products."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            a, b = args[-2:]
            self.count += a.shape[0] * a.shape[1] * b.shape[1]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("temperature", "softcap"), [(1.0, None), (0.7, None), (1.3, 2.0)])
@pytest.mark.parametrize("head_type", ["plain", "bias", "adapted", "frozen"])
def test_a_loss_a_chunk_at_a_time_has_the_plain_gradients(
    head_type: str, temperature: float, softcap: float | None
) -> None:
    head = Adapted() if head_type == "adapted" else nn.Linear(H, V, bias=head_type == "bias")
    head.requires_grad_(head_type != "frozen")
    hidden, labels, weights = problem()

    def loss_of(logprobs: Tensor, rows: slice) -> Tensor:
        return (weights[rows] * (0.1 * logprobs).exp()).sum()

    loss, logprobs, entropy = token_loss(
        hidden, head, labels, loss_of, temperature=temperature, chunk=CHUNK, softcap=softcap
    )
    expected, expected_entropy = plain(hidden, head, labels, temperature, softcap)
    expected_loss = loss_of(expected, slice(None))
    torch.testing.assert_close((loss, logprobs, entropy), (expected_loss, expected, expected_entropy))
    assert not logprobs.requires_grad
    inputs = [hidden, *trainable(head)]
    torch.testing.assert_close(torch.autograd.grad(loss, inputs), torch.autograd.grad(expected_loss, inputs))


@pytest.mark.parametrize(("trained", "products"), [(True, 3), (False, 2)])
def test_of_a_loss_a_chunk_at_a_time_no_product_is_computed_twice(trained: bool, products: int) -> None:
    head = nn.Linear(H, V, bias=False).requires_grad_(trained)
    hidden, labels, weights = problem()
    with Products() as once, LargestTensor() as largest:
        token_loss(hidden, head, labels, lambda a, rows: (weights[rows] * a).sum(), temperature=1.0, chunk=CHUNK)[
            0
        ].backward()
    with Products() as twice:
        token_logprobs(hidden, head, labels, temperature=1.0, chunk=CHUNK)[0].backward(weights)
    assert (once.count, twice.count) == (products * N * H * V, (products + 1) * N * H * V)
    assert largest.numel == CHUNK * V


def test_a_loss_that_is_not_the_last_word_is_refused() -> None:
    """Its gradients are made already, for a factor of one."""
    head = nn.Linear(H, V)
    hidden, labels, _ = problem()
    loss, _, _ = token_loss(hidden, head, labels, lambda a, rows: a.sum(), temperature=1.0, chunk=CHUNK)
    with pytest.raises(RuntimeError, match="the one that backward"):
        (2 * loss).backward()


def test_nothing_of_the_vocabularys_length_is_saved_for_the_backward_pass_but_the_head() -> None:
    head = nn.Linear(H, V)
    hidden, labels, _ = problem()
    saved: list[int] = []

    def record(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        token_logprobs(hidden, head, labels, temperature=1.0, chunk=CHUNK)
    assert sorted(saved) == sorted([N * H, N, N, V * H, V])


def test_a_bfloat16_heads_gradient_adds_up_in_float32() -> None:
    """256 chunks of one row each: summed in bfloat16, the later ones would be rounded away."""
    head = nn.Linear(H, V, bias=False).bfloat16()
    hidden = torch.rand(256, H).bfloat16()
    labels, upstream = torch.zeros(256, dtype=torch.int64), torch.full((256,), 1e-3)

    def gradient(chunk: int) -> Tensor:
        logprobs, _ = token_logprobs(hidden, head, labels, temperature=1.0, chunk=chunk)
        return torch.autograd.grad(logprobs, head.weight, upstream)[0].float()

    exact = nn.Linear(H, V, bias=False)
    exact.weight.data = head.weight.data.float()
    expected = torch.autograd.grad(plain(hidden.float(), exact, labels, 1.0, None)[0], exact.weight, upstream)[0]

    def error(tensor: Tensor) -> float:
        return ((tensor - expected).norm() / expected.norm()).item()

    rows = [token_logprobs(hidden[i : i + 1], head, labels[:1], temperature=1.0, chunk=1)[0] for i in range(256)]
    in_bfloat16 = torch.zeros_like(head.weight)
    for row in rows:
        in_bfloat16 += torch.autograd.grad(row, head.weight, upstream[:1])[0]
    assert error(gradient(1)) < 5e-3
    assert error(in_bfloat16.float()) > 4 * error(gradient(1))


def test_dropout_in_the_head_is_refused_by_name() -> None:
    head = nn.Sequential(nn.Dropout(0.1), nn.Linear(H, V))
    hidden, labels, _ = problem()
    with pytest.raises(ValueError, match=r"dropout 0.1 in the language model head \(0\)"):
        token_logprobs(hidden, head, labels, temperature=1.0, chunk=CHUNK)
    token_logprobs(hidden, head.eval(), labels, temperature=1.0, chunk=CHUNK)


@pytest.mark.parametrize("narrowest", [8, 40])
@pytest.mark.parametrize(("temperature", "softcap"), [(1.0, None), (1.3, 2.0)])
def test_tiles_of_columns_give_what_whole_rows_give(
    monkeypatch: pytest.MonkeyPatch, narrowest: int, temperature: float, softcap: float | None
) -> None:
    monkeypatch.setattr(logprobs_module, "NARROWEST", narrowest)
    head = nn.Linear(H, V)
    hidden, labels, upstream = problem()
    with LargestTensor() as largest:
        logprobs, entropy = token_logprobs(hidden, head, labels, temperature=temperature, chunk=4, softcap=softcap)
        gradients = torch.autograd.grad(logprobs, [hidden, *head.parameters()], upstream)
    assert largest.numel <= max(4 * V, N * H, V * H)
    expected, expected_entropy = plain(hidden, head, labels, temperature, softcap)
    torch.testing.assert_close(logprobs, expected)
    torch.testing.assert_close(entropy, expected_entropy)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected, [hidden, *head.parameters()], upstream))


@pytest.mark.parametrize("at_once", [True, False])
def test_the_heads_gradient_goes_straight_to_its_float32_sum(at_once: bool) -> None:
    head = nn.Linear(H, V, bias=False).bfloat16()
    hidden, labels, upstream = problem()
    accumulate_fp32(head)
    how: Any = {"temperature": 1.0, "chunk": CHUNK}
    for _ in range(2):
        if at_once:
            loss_of = lambda logprobs, rows: (upstream[rows] * logprobs).sum()  # noqa: E731
            token_loss(hidden.detach().bfloat16(), head, labels, loss_of, **how)[0].backward()
        else:
            token_logprobs(hidden.bfloat16(), head, labels, **how)[0].backward(upstream)
    exact = nn.Linear(H, V, bias=False)
    exact.weight.data = head.weight.data.float()
    plain(hidden.bfloat16().float(), exact, labels, 1.0, None)[0].backward(2 * upstream)
    summed: Any = vars(head.weight)["main_grad"]
    assert head.weight.grad is None
    assert summed.dtype == torch.float32
    assert (summed - exact.weight.grad).norm() / exact.weight.grad.norm() < 5e-3  # type: ignore[union-attr]
