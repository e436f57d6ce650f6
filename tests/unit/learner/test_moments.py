"""Eight-bit moments: what is kept, what it costs, and what is said where the package is missing."""

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from syncline.config.schema import Optimizer
from syncline.errors import ConfigError
from syncline.learner import moments
from syncline.learner.moments import moment_of
from syncline.learner.optim import SplitMasterAdamW

CPU = torch.device("cpu")
SHAPE = torch.Size((32, 512))


def linear_codes() -> ModuleType:
    """torchao's functions, with 256 evenly spaced values for its map."""
    made: Any = ModuleType("torchao.optim.quant_utils")

    def create_dynamic_map(signed: bool = True) -> list[float]:
        return [i / 127 for i in range(-128, 128)] if signed else [i / 255 for i in range(256)]

    def scale_tensor(values: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
        blocks = values.view(-1, block_size)
        scale = blocks.abs().amax(-1).clip(1e-12)
        return (blocks / scale[:, None]).view(values.shape), scale

    made.create_dynamic_map, made.scale_tensor = create_dynamic_map, scale_tensor
    made.quantize_8bit_with_qmap = lambda scaled, qmap: (scaled[..., None] - qmap).abs().argmin(-1).to(torch.uint8)
    made.dequant_with_qmap = lambda codes, qmap, scale: (qmap[codes.int()].view(len(scale), -1) * scale[:, None]).view(
        codes.shape
    )
    return made


@pytest.fixture
def torchao(monkeypatch: pytest.MonkeyPatch) -> None:
    package, optim = ModuleType("torchao"), ModuleType("torchao.optim")
    optim.quant_utils = linear_codes()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchao", package)
    monkeypatch.setitem(sys.modules, "torchao.optim", optim)
    moments._quantizer.cache_clear()
    yield  # type: ignore[misc]
    moments._quantizer.cache_clear()


def test_without_the_package_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    moments._quantizer.cache_clear()
    with pytest.raises(ConfigError, match=r"learner.optimizer.moments: 'int8' needs the package torchao .*pip install"):
        moment_of(SHAPE, CPU, "int8", signed=True)


@pytest.mark.parametrize("signed", [True, False])
def test_eight_bits_begin_at_zero_and_keep_what_is_written(torchao: None, signed: bool) -> None:
    moment = moment_of(SHAPE, CPU, "int8", signed=signed)
    values = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    values = values if signed else values.abs()
    with moment.rows(slice(8, 16)) as rows:
        assert not rows.any()
        rows.copy_(values[8:16])
    with moment.rows(slice(0, 32)) as rows:
        assert not rows[:8].any()
        assert (rows[8:16] - values[8:16]).abs().max() < 0.03
    state = moment.state("exp_avg")
    assert {name: tensor.dtype for name, tensor in state.items()} == {
        "exp_avg": torch.uint8,
        "exp_avg_scales": torch.float32,
    }
    assert sum(tensor.nbytes for tensor in state.values()) == values.numel() * (1 + 4 / 256)


@pytest.mark.parametrize("shape", [(512,), (4, 256), (32, 500), ()])
def test_what_is_small_or_fills_no_blocks_stays_in_float32(torchao: None, shape: tuple[int, ...]) -> None:
    [kept] = moment_of(torch.Size(shape), CPU, "int8", signed=True).state("exp_avg").values()
    assert (kept.dtype, tuple(kept.shape)) == (torch.float32, shape)


def test_a_resumed_optimizer_takes_the_same_steps(torchao: None) -> None:
    config = Optimizer(learning_rate=1e-3, moments="int8", max_grad_norm=None)
    gradients = [torch.randn(SHAPE, generator=torch.Generator().manual_seed(i)) for i in range(4)]

    def stepped(weight: nn.Parameter, optimizer: SplitMasterAdamW, some: list[Tensor]) -> None:
        for gradient in some:
            weight.grad = gradient.bfloat16()
            optimizer.step(1e-3)

    whole = nn.Parameter(torch.ones(SHAPE, dtype=torch.bfloat16))
    uninterrupted = SplitMasterAdamW([("w", whole)], config)
    stepped(whole, uninterrupted, gradients[:2])
    copy = nn.Parameter(whole.detach().clone())
    resumed = SplitMasterAdamW([("w", copy)], config)
    resumed.load_state_dict({name: tensor.clone() for name, tensor in uninterrupted.state_dict().items()})
    stepped(whole, uninterrupted, gradients[2:])
    stepped(copy, resumed, gradients[2:])
    assert torch.equal(whole, copy)
    assert not torch.equal(whole, torch.ones_like(whole))
