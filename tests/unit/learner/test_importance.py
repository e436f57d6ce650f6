import math

import pytest
import torch

from syncline.config.schema import Importance
from syncline.learner.importance import importance_weights

SAMPLER = torch.tensor([-1.0, -1.0, -1.0])
LEARNER = SAMPLER + torch.tensor([math.log(4.0), math.log(0.5), math.log(0.25)])
"""Token ratios 4, 1/2, 1/4; as samples (0, 1) and (2): 4 * 1/2 = 2 and 1/4."""
INDEX = torch.tensor([0, 0, 1])


def weights(**importance: object) -> list[float]:
    config = Importance.model_validate(importance)
    return importance_weights(LEARNER, SAMPLER, sample_index=INDEX, importance=config)[0].tolist()


@pytest.mark.parametrize(
    ("level", "mode", "expected"),
    [
        ("none", "truncate", [1, 1, 1]),
        ("token", "truncate", [3, 0.5, 0.3]),
        ("token", "mask", [0, 0.5, 0]),
        ("sequence", "truncate", [2, 2, 0.3]),
        ("sequence", "mask", [2, 2, 0]),
    ],
)
def test_weights_worked_by_hand(level: str, mode: str, expected: list[float]) -> None:
    assert weights(level=level, mode=mode, clip_min=0.3, clip_max=3.0) == pytest.approx(expected)


def test_weights_are_constants_to_autograd() -> None:
    policy = LEARNER.clone().requires_grad_()
    result, _ = importance_weights(policy, SAMPLER, sample_index=INDEX, importance=Importance())
    assert not result.requires_grad


def test_a_hopeless_ratio_is_truncated_or_masked_but_never_infinite() -> None:
    learner, sampler, index = torch.zeros(200), torch.full((200,), -5.0), torch.zeros(200, dtype=torch.int64)
    for mode, expected in (("truncate", 2.0), ("mask", 0.0)):
        config = Importance.model_validate({"level": "sequence", "mode": mode})
        result, tally = importance_weights(learner, sampler, sample_index=index, importance=config)
        assert result.tolist() == [expected] * 200
        assert all(math.isfinite(value) for value in tally.metrics().values())


def test_tallies_of_microbatches_add_up_to_the_batches() -> None:
    config = Importance(level="token", mode="mask", clip_min=0.3, clip_max=3.0)
    _, whole = importance_weights(LEARNER, SAMPLER, sample_index=INDEX, importance=config)
    _, first = importance_weights(LEARNER[:2], SAMPLER[:2], sample_index=INDEX[:2], importance=config)
    _, second = importance_weights(LEARNER[2:], SAMPLER[2:], sample_index=INDEX[2:] - 1, importance=config)
    log2 = math.log(2)
    expected = {
        "sampling/importance_sampling_ratio/min": 0.0,
        "sampling/importance_sampling_ratio/mean": 0.5 / 3,
        "sampling/importance_sampling_ratio/max": 0.5,
        "sampling/sampling_logp_difference/mean": 5 * log2 / 3,  # 2 + 1 + 2 times ln 2
        "sampling/sampling_logp_difference/max": 2 * log2,
        "sampling/kept_ratio": 1 / 3,
        "sampling/k3_kl": (4.75 - log2 * (2 - 1 - 2) - 3) / 3,  # sum of r - ln r - 1
    }
    assert whole.metrics() == pytest.approx(expected, rel=1e-6)
    assert (first + second).metrics() == pytest.approx(expected, rel=1e-6)
