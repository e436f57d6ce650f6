import math
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from syncline.config.schema import Optimizer
from syncline.errors import CheckpointError, TrainingError
from syncline.learner import optim
from syncline.learner.optim import SplitMasterAdamW, accumulate_fp32, join_master, split_master

RATE = 1e-6
CONFIG = Optimizer(learning_rate=RATE, weight_decay=0.1, max_grad_norm=1e9)
SHAPES = {"layer.weight": (37, 13), "norm.weight": (7,), "scale": ()}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def parameters(dtype: torch.dtype) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return {
        name: nn.Parameter(torch.randn(shape, generator=generator).bfloat16().to(dtype))
        for name, shape in SHAPES.items()
    }


def step(optimizer: SplitMasterAdamW, own: dict[str, nn.Parameter], gradients: dict[str, Tensor]) -> float:
    for name, parameter in own.items():
        parameter.grad = gradients[name].to(parameter.dtype)
    return optimizer.step(RATE)


def gradients() -> dict[str, Tensor]:
    return {name: torch.randn(shape).bfloat16().float() for name, shape in SHAPES.items()}


def masters(own: dict[str, nn.Parameter], optimizer: SplitMasterAdamW) -> dict[str, Tensor]:
    state = optimizer.state_dict()
    return {name: join_master(parameter.detach(), state[f"{name}.low_bits"]) for name, parameter in own.items()}


def test_split_keeps_every_bit_and_the_nearest_bfloat16() -> None:
    master = torch.cat([torch.randn(10_000) * 10.0**e for e in range(-40, 38, 3)] + [torch.tensor([0.0, -0.0, 3.4e38])])
    ties = torch.tensor([0x3F808000, 0x3F818000, -0x407F8000], dtype=torch.int32).view(torch.float32)
    master = torch.cat([master, ties])
    upper, low_bits = torch.empty_like(master, dtype=torch.bfloat16), torch.empty_like(master, dtype=torch.int16)
    split_master(master, upper, low_bits)
    assert torch.equal(join_master(upper, low_bits).view(torch.int32), master.view(torch.int32))
    nearest = master.bfloat16()
    distances = ((upper.double() - master.double()).abs(), (nearest.double() - master.double()).abs())
    finite = nearest.isfinite()
    assert torch.equal(distances[0][finite], distances[1][finite])


@pytest.mark.parametrize("chunk_elements", [1 << 24, 50])
def test_bfloat16_weights_follow_float32_adamw_bit_for_bit(
    monkeypatch: pytest.MonkeyPatch, chunk_elements: int
) -> None:
    """60 steps of 1e-6: near 1, bfloat16 weights are 2^-8 apart, so a plain AdamW on them would not move."""
    monkeypatch.setattr(optim, "CHUNK_ELEMENTS", chunk_elements)
    own, reference, start = parameters(torch.bfloat16), parameters(torch.float32), parameters(torch.float32)
    optimizer = SplitMasterAdamW(own.items(), CONFIG)
    groups = [
        {"params": [p for p in reference.values() if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in reference.values() if p.ndim < 2], "weight_decay": 0.0},
    ]
    torch_adamw = torch.optim.AdamW(groups, lr=RATE, betas=CONFIG.betas, eps=CONFIG.eps)
    for _ in range(60):
        given = gradients()
        for name, parameter in reference.items():
            parameter.grad = given[name].clone()
        step(optimizer, own, given)
        torch_adamw.step()
    for name, master in masters(own, optimizer).items():
        assert torch.equal(master, reference[name].detach()), name
        assert torch.equal(own[name].detach(), master.bfloat16()), name
        assert not torch.equal(master, start[name].detach()), name
    moved = (masters(own, optimizer)["layer.weight"] - start["layer.weight"]).abs().mean().item()
    assert 1e-6 < moved < 6e-5


def test_float32_weights_equal_adamw_too() -> None:
    own, reference = parameters(torch.float32), parameters(torch.float32)
    optimizer = SplitMasterAdamW(own.items(), CONFIG.model_copy(update={"weight_decay": 0.0}))
    torch_adamw = torch.optim.AdamW(reference.values(), lr=RATE, betas=CONFIG.betas, eps=CONFIG.eps, weight_decay=0.0)
    for _ in range(5):
        given = gradients()
        for name, parameter in reference.items():
            parameter.grad = given[name].clone()
        step(optimizer, own, given)
        torch_adamw.step()
    assert all(torch.equal(own[name], reference[name]) for name in SHAPES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_view_of_foreign_memory_is_written_in_place(dtype: torch.dtype) -> None:
    """A column shard of a fused matrix: strided, and read by somebody else."""
    memory = torch.randn(6, 10).to(dtype)
    before = memory.clone()
    shard, whole = nn.Parameter(memory[:, 2:5]), nn.Parameter(before[:, 2:5].clone())
    gradient = torch.randn(6, 3).to(dtype)
    for parameter in (shard, whole):
        parameter.grad = gradient.clone()
        SplitMasterAdamW([("w", parameter)], CONFIG).step(0.1)
    assert torch.equal(memory[:, 2:5], whole.detach())
    assert not torch.equal(memory[:, 2:5], before[:, 2:5])
    assert torch.equal(memory[:, :2], before[:, :2])
    assert torch.equal(memory[:, 5:], before[:, 5:])


def test_the_norm_is_clipped_over_all_parameters() -> None:
    """Gradients 3 and 4 have norm 5; clipped to 2.5 they are 1.5 and 2, and the first moment holds a tenth of that."""
    own = {"a": nn.Parameter(torch.ones(1)), "b": nn.Parameter(torch.ones(1))}
    optimizer = SplitMasterAdamW(own.items(), CONFIG.model_copy(update={"max_grad_norm": 2.5}))
    assert step(optimizer, own, {"a": torch.tensor([3.0]), "b": torch.tensor([-4.0])}) == pytest.approx(5.0)
    state = optimizer.state_dict()
    assert state["a.exp_avg"].item() == pytest.approx(0.15, rel=1e-5)
    assert state["b.exp_avg"].item() == pytest.approx(-0.2, rel=1e-5)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_is_named_and_nothing_moves(value: float) -> None:
    own = parameters(torch.bfloat16)
    optimizer = SplitMasterAdamW(own.items(), CONFIG)
    step(optimizer, own, gradients())
    before = {name: tensor.clone() for name, tensor in optimizer.state_dict().items()}
    weights = {name: parameter.detach().clone() for name, parameter in own.items()}
    bad = gradients()
    bad["norm.weight"][3] = value
    with pytest.raises(TrainingError, match=r"'norm.weight' \(1 of 3 parameters\)"):
        step(optimizer, own, bad)
    assert all(torch.equal(before[name], tensor) for name, tensor in optimizer.state_dict().items())
    assert all(torch.equal(weights[name], parameter) for name, parameter in own.items())


def test_a_step_without_any_gradient_is_an_error_and_a_step_uses_its_gradients_up() -> None:
    own = parameters(torch.bfloat16)
    optimizer = SplitMasterAdamW(own.items(), CONFIG)
    step(optimizer, own, gradients())
    with pytest.raises(ValueError, match="no parameter has a gradient"):
        optimizer.step(RATE)


def test_frozen_parameters_have_no_state_and_other_types_are_refused() -> None:
    frozen = nn.Parameter(torch.ones(2), requires_grad=False)
    optimizer = SplitMasterAdamW([("a", nn.Parameter(torch.ones(2))), ("b", frozen)], CONFIG)
    assert sorted(optimizer.state_dict()) == ["a.exp_avg", "a.exp_avg_sq", "num_steps"]
    with pytest.raises(ValueError, match=r"'h' is torch\.float16"):
        SplitMasterAdamW([("h", nn.Parameter(torch.ones(2, dtype=torch.float16)))], CONFIG)


def test_a_restored_optimizer_goes_on_bit_for_bit() -> None:
    own = parameters(torch.bfloat16)
    optimizer = SplitMasterAdamW(own.items(), CONFIG)
    steps = [gradients() for _ in range(6)]
    for given in steps[:3]:
        step(optimizer, own, given)
    saved = load(save(optimizer.state_dict()))
    other = {name: nn.Parameter(parameter.detach().clone()) for name, parameter in own.items()}
    restored = SplitMasterAdamW(other.items(), CONFIG)
    restored.load_state_dict(saved)
    for given in steps[3:]:
        step(optimizer, own, given)
        step(restored, other, given)
    ours, theirs = optimizer.state_dict(), restored.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert all(torch.equal(parameter, other[name]) for name, parameter in own.items())


def test_a_state_that_does_not_fit_is_named() -> None:
    optimizer = SplitMasterAdamW(parameters(torch.bfloat16).items(), CONFIG)
    state = optimizer.state_dict()
    without = {name: tensor for name, tensor in state.items() if name != "scale.low_bits"}
    for wrong, named in (
        (without, r"'scale.low_bits' is missing"),
        (state | {"extra.exp_avg": torch.zeros(1)}, r"'extra.exp_avg' is of no parameter"),
        (state | {"norm.weight.exp_avg": torch.zeros(8)}, r"'norm.weight.exp_avg' is torch.float32 \(8,\)"),
    ):
        with pytest.raises(CheckpointError, match=named):
            optimizer.load_state_dict(wrong)


def test_gradients_of_microbatches_add_up_in_float32() -> None:
    """1 + 256 times 2^-9: in bfloat16 every addition rounds back to 1, in float32 the sum is 1.5."""
    layer = nn.Linear(1, 1, bias=False).bfloat16()
    accumulate_fp32(layer)
    for pull in [1.0] + [2.0**-9] * 256:
        (layer.weight * pull).sum().backward()
    assert layer.weight.grad is None
    main_grad = vars(layer.weight)["main_grad"]
    assert isinstance(main_grad, Tensor)
    assert (main_grad.dtype, main_grad.item()) == (torch.float32, 1.5)
    optimizer = SplitMasterAdamW(layer.named_parameters(), CONFIG)
    assert optimizer.step(RATE) == 1.5
    assert vars(layer.weight)["main_grad"] is None


@pytest.mark.parametrize("summed_in", ["float32", "bfloat16"])
def test_stepping_in_the_backward_pass_is_a_step_after_it(summed_in: str) -> None:
    """Two micro-batches; the last one's backward pass steps each parameter and frees its gradient."""
    config = CONFIG.model_copy(update={"max_grad_norm": None})
    inputs = torch.randn(2, 5, 37).bfloat16()

    def trained(in_backward: bool) -> tuple[list[Tensor], float]:
        torch.manual_seed(3)
        layer = nn.Sequential(nn.Linear(37, 13), nn.Linear(13, 4)).bfloat16()
        if summed_in == "float32":
            accumulate_fp32(layer)
        optimizer = SplitMasterAdamW(layer.named_parameters(), config)
        layer(inputs[0]).square().sum().backward()
        if in_backward:
            with optimizer.stepping_in_backward(1e-2) as squares:
                layer(inputs[1]).square().sum().backward()
            norm = float(torch.stack(squares).sum().sqrt())
        else:
            layer(inputs[1]).square().sum().backward()
            norm = optimizer.step(1e-2)
        assert all(p.grad is None and getattr(p, "main_grad", None) is None for p in layer.parameters())
        return [p.detach() for p in layer.parameters()], norm

    (ours, our_norm), (expected, norm) = trained(True), trained(False)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
    assert our_norm == pytest.approx(norm)


def test_a_gradient_that_is_not_finite_ends_the_backward_pass_by_name() -> None:
    own = parameters(torch.float32)
    optimizer = SplitMasterAdamW(own.items(), CONFIG.model_copy(update={"max_grad_norm": None}))
    with (
        pytest.raises(TrainingError, match=r"not finite in parameter 'layer\.weight'"),
        optimizer.stepping_in_backward(RATE),
    ):
        (own["layer.weight"] * float("nan")).sum().backward()


def test_stepping_in_the_backward_pass_waits_for_no_answer() -> None:
    """On a GPU each would hold back the launches of the rest."""

    class Answers(TorchDispatchMode):
        num_fetched = 0

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.num_fetched += function is torch.ops.aten._local_scalar_dense.default
            return function(*args, **(kwargs or {}))

    own = parameters(torch.bfloat16)
    optimizer = SplitMasterAdamW(own.items(), CONFIG.model_copy(update={"max_grad_norm": None}))
    with optimizer.stepping_in_backward(RATE) as squares, Answers() as answers:
        torch.stack([parameter.float().square().sum() for parameter in own.values()]).sum().backward()
        assert (len(squares), answers.num_fetched) == (len(own), 0)


def test_without_a_limit_no_gradient_is_scaled() -> None:
    moved = []
    for limit in (None, 1e9):
        own = parameters(torch.float32)
        optimizer = SplitMasterAdamW(own.items(), CONFIG.model_copy(update={"max_grad_norm": limit}))
        step(optimizer, own, {name: torch.full(shape, 1e3) for name, shape in SHAPES.items()})
        moved.append(own)
    assert all(torch.equal(moved[0][name], moved[1][name]) for name in SHAPES)
