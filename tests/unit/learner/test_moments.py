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
from syncline.learner.moments import in_float32, moment_of
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
@pytest.mark.parametrize(("row", "block"), [(512, 256), (896, 128), (528, 16)])
def test_eight_bits_begin_at_zero_and_keep_what_is_written(torchao: None, row: int, block: int, signed: bool) -> None:
    shape = torch.Size((32, row))
    moment = moment_of(shape, CPU, "int8", signed=signed)
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = values if signed else values.abs()
    with in_float32([moment], [slice(8, 16)]) as [rows]:
        assert not rows.any()
        rows.copy_(values[8:16].flatten())
    with in_float32([moment], [slice(0, 32)]) as [flat]:
        rows = flat.view(shape)
        assert not rows[:8].any()
        assert (rows[8:16] - values[8:16]).abs().max() < 0.03
    state = moment.state("exp_avg")
    assert {name: tensor.dtype for name, tensor in state.items()} == {
        "exp_avg": torch.uint8,
        "exp_avg_scales": torch.float32,
    }
    assert sum(tensor.nbytes for tensor in state.values()) == values.numel() * (1 + 4 / block)


@pytest.mark.parametrize("shape", [(512,), (4, 256), (32, 504), ()])
def test_what_is_small_or_fills_no_blocks_stays_in_float32(torchao: None, shape: tuple[int, ...]) -> None:
    [kept] = moment_of(torch.Size(shape), CPU, "int8", signed=True).state("exp_avg").values()
    assert (kept.dtype, tuple(kept.shape)) == (torch.float32, shape)


def test_what_stays_in_float32_is_said_once_with_its_share(torchao: None, caplog: pytest.LogCaptureFixture) -> None:
    own = {
        "w": nn.Parameter(torch.ones(64, 896)),
        "odd": nn.Parameter(torch.ones(64, 104)),
        "b": nn.Parameter(torch.ones(896)),
    }
    with caplog.at_level("INFO"):
        SplitMasterAdamW(own.items(), Optimizer(moments="int8"))
    [said] = [record.getMessage() for record in caplog.records]
    assert said.startswith("moments in float32, not int8: 11.64 % of what is trained, 2 of 3 parameters")


@pytest.mark.parametrize("row", [512, 896])
def test_the_package_itself_keeps_moments_as_close_as_its_codes(row: int) -> None:
    pytest.importorskip("torchao")
    moments._quantizer.cache_clear()
    own, exact = nn.Parameter(torch.ones(32, row)), nn.Parameter(torch.ones(32, row))
    kinds = (("int8", own), ("float32", exact))
    eight, whole = (SplitMasterAdamW([("w", p)], Optimizer(moments=kind)) for kind, p in kinds)  # pyright: ignore
    for i in range(5):
        gradient = torch.randn(32, row, generator=torch.Generator().manual_seed(i))
        for parameter, optimizer in ((own, eight), (exact, whole)):
            parameter.grad = gradient.clone()
            optimizer.step(1e-2)
    moved = (exact - 1).abs().mean()
    assert (own - exact).abs().mean() < 0.1 * moved
    assert eight.state_dict()["w.exp_avg"].dtype == torch.uint8


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
