import pytest
import torch
from transformers import get_linear_schedule_with_warmup

from syncline.config.schema import Optimizer
from syncline.learner.schedule import learning_rate

COSINE = Optimizer(learning_rate=1.0, min_learning_rate=0.2, num_warmup_steps=2)


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, 0.5),  # 1/2 of the warm-up
        (1, 1.0),
        (2, 1.0),  # cos 0 = 1
        (3, 0.2 + 0.8 * 0.75),  # progress 1/3, cos(pi/3) = 1/2
        (4, 0.2 + 0.8 * 0.25),  # progress 2/3, cos(2 pi/3) = -1/2
    ],
)
def test_warm_up_then_cosine(step: int, expected: float) -> None:
    assert learning_rate(step, COSINE, num_steps=5) == pytest.approx(expected)


def test_constant_after_the_warm_up() -> None:
    config = Optimizer(learning_rate=3.0, schedule="constant", num_warmup_steps=3)
    assert [learning_rate(step, config, num_steps=5) for step in range(5)] == pytest.approx([1.0, 2.0, 3.0, 3.0, 3.0])


@pytest.mark.parametrize(("num_warmup_steps", "num_steps"), [(0, 7), (3, 10), (9, 10)])
def test_a_line_after_the_warm_up_is_transformers(num_warmup_steps: int, num_steps: int) -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    theirs = get_linear_schedule_with_warmup(torch.optim.SGD([parameter], lr=2.0), num_warmup_steps, num_steps)
    config = Optimizer(learning_rate=2.0, schedule="linear", num_warmup_steps=num_warmup_steps)
    for step in range(num_steps):
        ours, rate = learning_rate(step, config, num_steps=num_steps), 2.0 * theirs.lr_lambdas[0](step)
        assert ours == pytest.approx(rate if step >= num_warmup_steps else rate + 2.0 / num_warmup_steps)


def test_a_line_ends_at_the_minimum() -> None:
    config = Optimizer(learning_rate=1.0, min_learning_rate=0.2, schedule="linear")
    assert [learning_rate(step, config, num_steps=4) for step in range(4)] == pytest.approx([1.0, 0.8, 0.6, 0.4])


def test_no_step_runs_at_zero() -> None:
    config = Optimizer(learning_rate=1.0, num_warmup_steps=1)
    assert min(learning_rate(step, config, num_steps=10) for step in range(10)) > 0


@pytest.mark.parametrize("step", [-1, 5])
def test_a_step_outside_the_run_is_refused(step: int) -> None:
    with pytest.raises(ValueError, match=rf"\[0, 5\), got {step}"):
        learning_rate(step, COSINE, num_steps=5)
