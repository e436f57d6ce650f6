"""A step over batches of parameters is, bit by bit, the step of each parameter by itself."""

from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import pytest
import torch
from test_moments import linear_codes
from torch import Tensor, nn
from torch.optim.adamw import adamw

from syncline.config.schema import Optimizer
from syncline.learner import moments, optim
from syncline.learner.optim import SplitMasterAdamW, join_master, split_master

SHAPES = ((37, 13), (7,), (), (9, 512), (0, 5), (5, 896), (1, 1), (90, 48), (4097,), (3, 5, 7), (17, 256))


def chunks(tensor: Tensor) -> list[Tensor]:
    if not tensor.numel():
        return []
    rows = tensor if tensor.ndim else tensor[None]
    return list(rows.split(max(1, optim.CHUNK_ELEMENTS * len(rows) // tensor.numel())))


class Alone:
    """One parameter: its master whole, a call of torch's AdamW for as many rows as a chunk holds, moments coded whole.
    A CPU's kernel rounds the last few elements of a call in its own way, so calls must be of the same rows."""

    def __init__(self, weight: Tensor, config: Optimizer, codes: Any) -> None:
        self.weight, self.config, self.codes = weight, config, codes
        self.low = torch.zeros(weight.shape, dtype=torch.int16) if weight.dtype == torch.bfloat16 else None
        self.kept = [torch.zeros(weight.shape) for _ in range(2)]
        block = moments.block_of(weight.shape) if config.moments == "int8" else None
        self.block, self.steps = block, 0

    def coded(self, values: Tensor, signed: bool) -> Tensor:
        if self.block is None:
            return values
        code = torch.tensor(self.codes.create_dynamic_map(signed))
        scaled, scales = self.codes.scale_tensor(values, self.block)
        return self.codes.dequant_with_qmap(self.codes.quantize_8bit_with_qmap(scaled, code), code, scales)

    def step(self, gradient: Tensor, *, rate: float, clip: float) -> None:
        master = self.weight.clone() if self.low is None else join_master(self.weight, self.low)
        lists = [master, gradient.float() * clip, *self.kept]
        decay = self.config.weight_decay if self.weight.ndim >= 2 else 0.0
        betas = dict(zip(("beta1", "beta2"), self.config.betas, strict=True))
        how = {"amsgrad": False, "maximize": False, "lr": rate, "weight_decay": decay, "eps": self.config.eps}
        for own in zip(*(chunks(tensor) for tensor in lists), strict=True):
            count = [torch.tensor(float(self.steps))]
            adamw(*([rows] for rows in own), [], count, fused=True, **betas, **how)  # pyright: ignore
        self.steps += 1
        self.kept = [self.coded(kept, signed) for kept, signed in zip(self.kept, (True, False), strict=True)]
        if self.low is None:
            self.weight.copy_(master)
        else:
            split_master(master, self.weight, self.low)


@pytest.fixture(autouse=True)
def codes() -> Iterator[Any]:
    made = linear_codes()
    with patch.object(moments, "_quantizer", lambda: moments._Quantizer(made)):
        yield made


def drawn(seed: int, dtypes: list[torch.dtype]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = [dtypes[int(torch.randint(len(dtypes), (), generator=generator))] for _ in SHAPES]
    return [torch.randn(shape, generator=generator).to(dtype) for shape, dtype in zip(SHAPES, sizes, strict=True)]


@pytest.mark.parametrize("kind", ["float32", "int8"])
@pytest.mark.parametrize("chunk_elements", [1 << 24, 1 << 13, 50])
@pytest.mark.parametrize("clipped", [True, False])
def test_batches_change_no_bit(
    monkeypatch: pytest.MonkeyPatch, codes: Any, kind: Any, chunk_elements: int, clipped: bool
) -> None:
    monkeypatch.setattr(optim, "CHUNK_ELEMENTS", chunk_elements)
    config = Optimizer(learning_rate=1e-3, weight_decay=0.1, moments=kind, max_grad_norm=0.5 if clipped else None)
    start = drawn(1, [torch.float32, torch.bfloat16])
    own = {str(i): nn.Parameter(weight.clone()) for i, weight in enumerate(start)}
    optimizer = SplitMasterAdamW(own.items(), config, rate_factors=lambda name: 0.1 if name == "3" else 1.0)
    alone = [Alone(weight.clone(), config, codes) for weight in start]
    for number in range(3):
        given = drawn(10 + number, [torch.float32, torch.bfloat16])
        with_gradient = [i for i in range(len(SHAPES)) if (i + number) % 4]
        for i in with_gradient:
            vars(own[str(i)])["main_grad"] = given[i].clone()
        norm = optimizer.step(1e-3)
        clip = min(1.0, 0.5 / (norm + 1e-6)) if clipped else 1.0
        for i, other in enumerate(alone):
            if i in with_gradient:
                other.step(given[i], rate=1e-3 * (0.1 if i == 3 else 1.0), clip=clip)
            else:
                other.steps += 1
    state = optimizer.state_dict()
    for i, other in enumerate(alone):
        assert torch.equal(own[str(i)].detach(), other.weight), SHAPES[i]
        if other.low is not None:
            assert torch.equal(state[f"{i}.low_bits"], other.low), SHAPES[i]
        if other.block is None:
            assert torch.equal(state[f"{i}.exp_avg"], other.kept[0]), SHAPES[i]
            assert torch.equal(state[f"{i}.exp_avg_sq"], other.kept[1]), SHAPES[i]
    assert not torch.equal(own["0"].detach(), start[0])


def test_many_small_parameters_are_stepped_in_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    fused = torch._fused_adamw_

    def counted(own: list[Tensor], *rest: Any, **how: Any) -> None:
        calls.append(len(own))
        fused(own, *rest, **how)

    monkeypatch.setattr(torch, "_fused_adamw_", counted)
    layers = {f"{i}.weight": nn.Parameter(torch.randn(8, 8).bfloat16()) for i in range(100)}
    norms = {f"{i}.norm": nn.Parameter(torch.randn(8).bfloat16()) for i in range(100)}
    optimizer = SplitMasterAdamW((layers | norms).items(), Optimizer(weight_decay=0.1))
    for parameter in (layers | norms).values():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step(1e-3)
    assert calls == [100, 100], "those that decay, and the others"
