"""The learning rate of a step: a linear warm-up, then a cosine or a line to the minimum, or constant."""

import math

from syncline.config.schema import Optimizer


def learning_rate(step: int, optimizer: Optimizer, *, num_steps: int) -> float:
    """Rate of the optimizer step with this index, 0 the first of `num_steps`.

    Step `i` of `w` warm-up steps runs at `(i + 1) / w` of the full rate, so none is wasted on a rate of 0. The cosine
    (SGDR, arXiv 1608.03983 eq. 5, without restarts) and the line (transformers' `get_linear_schedule_with_warmup`,
    whose warm-up begins at 0) leave the full rate at step `w` and would reach the minimum at `num_steps`.
    """
    if not 0 <= step < num_steps:
        raise ValueError(f"step must be in [0, {num_steps}), got {step}")
    if step < optimizer.num_warmup_steps:
        return optimizer.learning_rate * (step + 1) / optimizer.num_warmup_steps
    if optimizer.schedule == "constant":
        return optimizer.learning_rate
    progress = (step - optimizer.num_warmup_steps) / (num_steps - optimizer.num_warmup_steps)
    spread = optimizer.learning_rate - optimizer.min_learning_rate
    left = 1 - progress if optimizer.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return optimizer.min_learning_rate + spread * left
