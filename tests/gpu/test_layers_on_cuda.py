"""Compiled layers on a GPU, a compilation a test: each keeps less for the backward pass, and gradients stay.

Through torch's own variable-length attention, which the compiler sees as one operator.
"""

from collections.abc import Callable
from functools import cache

import pytest
import torch
from packed_on_cuda import LENGTHS, models, sample

from syncline.config.schema import Learner
from syncline.learner.model import Scorer, run_layers_as
from syncline.learner.packing import pack_samples

Measured = tuple[torch.Tensor, int]
"""All gradients, and the bytes kept between the two passes."""
LESS_THAN = {"selective": "none", "attention": "selective", "full": "attention"}


@pytest.fixture(scope="module")
def measured() -> Callable[[str], Measured]:
    """By what is computed again; compiled when it is first asked for."""
    return cache(_measured)


def _measured(what: str) -> Measured:
    torch._dynamo.reset()
    [batch] = pack_samples([sample(length, i) for i, length in enumerate(LENGTHS * 6)], token_budget=16384)
    packed, _ = models()
    running = Learner.model_validate({"compile": "on", "recomputation": {"what": what}})
    run_layers_as(running, packed.train(), device=torch.device("cuda"))
    kept = 0
    for _ in range(2):  # the first compiles
        packed.zero_grad()
        before = torch.cuda.memory_allocated()
        logprobs, _ = Scorer(1.0, 256).score(packed, batch.to("cuda"))
        kept = torch.cuda.memory_allocated() - before
        logprobs.sum().backward()
    return torch.cat([p.grad.float().flatten() for p in packed.parameters()]), kept


@pytest.mark.parametrize("what", LESS_THAN)
def test_layers_that_compute_again_keep_less_and_have_the_same_gradients(
    measured: Callable[[str], Measured], what: str
) -> None:
    (expected, _), (_, more), (gradients, kept) = map(measured, ("none", LESS_THAN[what], what))
    error = (gradients - expected).norm() / expected.norm()
    assert error < 0.02, f"relative gradient error {error:.4f}"
    assert kept < more
