import pytest

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


def test_no_step_runs_at_zero() -> None:
    config = Optimizer(learning_rate=1.0, num_warmup_steps=1)
    assert min(learning_rate(step, config, num_steps=10) for step in range(10)) > 0


@pytest.mark.parametrize("step", [-1, 5])
def test_a_step_outside_the_run_is_refused(step: int) -> None:
    with pytest.raises(ValueError, match=rf"\[0, 5\), got {step}"):
        learning_rate(step, COSINE, num_steps=5)
