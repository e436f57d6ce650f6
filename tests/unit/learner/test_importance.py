import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from syncline.config.schema import Importance
from syncline.learner.importance import ImportanceTally, importance_weights
from syncline.learner.losses import ALGORITHMS, weighted_loss

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "importance.json").read_text())
ROWS = [pytest.param(row, id=f"{row['level']}-{row['mode']}-{row['band']}") for row in GOLDEN["rows"]]
LEVELS = ("none", "token", "sequence", "geometric")
SAMPLER = torch.full((5,), -1.0)
LEARNER = SAMPLER + torch.tensor(GOLDEN["token_ratios"]).log()
INDEX = torch.tensor(GOLDEN["sample_index"])


def importance(row: dict, **fields: object) -> Importance:
    low, high = row["band"]
    return Importance.model_validate(
        {"level": row["level"], "mode": row["mode"], "clip_min": low, "clip_max": high} | fields
    )


def weigh(
    config: Importance, *, learner: Tensor = LEARNER, sampler: Tensor = SAMPLER
) -> tuple[Tensor, ImportanceTally]:
    return importance_weights(learner, sampler, sample_index=INDEX, importance=config)


@pytest.mark.parametrize("row", ROWS)
def test_weights_and_tally_match_the_hand_worked_table(row: dict) -> None:
    weights, tally = weigh(importance(row))
    assert weights.tolist() == pytest.approx(row["weights"], abs=1e-6)
    metrics = tally.metrics()
    assert metrics["sampling/kept_ratio"] == pytest.approx(row["kept"])
    assert metrics["sampling/importance_sampling_ratio/ess"] == pytest.approx(row["ess"], rel=1e-5)
    assert metrics["sampling/importance_sampling_ratio/mean"] == pytest.approx(sum(row["weights"]) / 5, rel=1e-6)
    assert metrics["sampling/importance_sampling_ratio/min"] == pytest.approx(min(row["weights"]))
    assert metrics["sampling/importance_sampling_ratio/max"] == pytest.approx(max(row["weights"]))


@pytest.mark.parametrize("row", ROWS[1:])
def test_the_table_tells_a_wrong_sign_and_a_wrong_level_apart(row: dict) -> None:
    right = torch.tensor(row["weights"])
    wrong_sign, _ = weigh(importance(row), learner=SAMPLER, sampler=LEARNER)
    assert (wrong_sign - right).abs().max() > 0.1
    for level in set(LEVELS) - {row["level"]}:
        assert (weigh(importance(row, level=level))[0] - right).abs().max() > 0.02, level


@pytest.mark.parametrize(
    ("mask", "weights", "kept"),
    [
        # Products 2, 0.25, 1.5 and geometric means sqrt 2, 0.5, 1.5 of the samples; token weights 3, 0.5, 0.4, 1, 1.5.
        ({"level": "sequence", "clip_min": 0.2, "clip_max": 1.8}, [0, 0, 0.4, 1, 1.5], 2 / 5),
        ({"level": "geometric", "clip_min": 0.6, "clip_max": 1.8}, [3, 0.5, 0, 0, 1.5], 2 / 5),
        ({"level": "geometric", "clip_min": 0.4, "clip_max": 1.45}, [3, 0.5, 0.4, 1, 0], 2 / 5),
    ],
)
def test_a_sequence_mask_leaves_whole_samples_out_of_what_tokens_weigh(mask: dict, weights: list, kept: float) -> None:
    config = Importance.model_validate({"level": "token", "clip_min": 0.4, "clip_max": 3.0, "sequence_mask": mask})
    found, tally = weigh(config)
    assert found.tolist() == pytest.approx(weights)
    assert tally.metrics()["sampling/kept_ratio"] == pytest.approx(kept)
    alone = config.model_copy(update={"level": "none"})
    assert weigh(alone)[0].tolist() == [float(weight > 0) for weight in weights]


def test_weights_are_constants_to_autograd() -> None:
    result, _ = weigh(Importance(), learner=LEARNER.clone().requires_grad_())
    assert not result.requires_grad


def test_the_parts_of_a_sample_are_weighed_against_the_versions_that_drew_them() -> None:
    """A sample that outlived a publish: its halves were drawn under two policies, and none of them is the learner's."""
    old, new, learner = torch.tensor([0.2, 0.2]), torch.tensor([0.8, 0.8]), torch.tensor([0.4, 0.4, 0.4, 0.4])
    drawn = torch.cat([old, new]).log()
    weights, _ = importance_weights(
        learner.log(), drawn, sample_index=torch.zeros(4, dtype=torch.int64), importance=Importance()
    )
    assert weights.tolist() == pytest.approx([2.0, 2.0, 0.5, 0.5])


def test_a_hopeless_ratio_is_truncated_or_masked_but_never_infinite() -> None:
    learner, sampler, index = torch.zeros(200), torch.full((200,), -5.0), torch.zeros(200, dtype=torch.int64)
    for mode, expected in (("truncate", 2.0), ("mask", 0.0)):
        config = Importance.model_validate({"level": "sequence", "mode": mode})
        result, tally = importance_weights(learner, sampler, sample_index=index, importance=config)
        assert result.tolist() == [expected] * 200
        assert all(math.isfinite(value) for value in tally.metrics().values())


def test_tallies_of_microbatches_add_up_to_the_batches() -> None:
    config = Importance(level="token", mode="mask", clip_min=0.4, clip_max=3.0)
    _, whole = weigh(config)
    parts = [
        importance_weights(LEARNER[part], SAMPLER[part], sample_index=INDEX[part] - INDEX[part][0], importance=config)
        for part in (slice(0, 2), slice(2, 5))
    ]
    log2 = math.log(2)
    expected = {
        "sampling/importance_sampling_ratio/min": 0.0,
        "sampling/importance_sampling_ratio/mean": 3 / 5,
        "sampling/importance_sampling_ratio/max": 1.5,
        "sampling/importance_sampling_ratio/ess": 9 / 17.5,
        "sampling/sampling_logp_difference/mean": (5 * log2 + math.log(1.5)) / 5,  # 2 + 1 + 2 + 0 times ln 2
        "sampling/sampling_logp_difference/max": 2 * log2,
        "sampling/kept_ratio": 3 / 5,
        "sampling/k3_kl": (7.25 - log2 * (2 - 1 - 2) - math.log(1.5) - 5) / 5,  # sum of r - ln r - 1
    }
    assert whole.metrics() == pytest.approx(expected, rel=1e-6)
    assert (parts[0][1] + parts[1][1]).metrics() == pytest.approx(expected, rel=1e-6)


# The point of it all: an expectation under the sampler, weighed, is the expectation under the learner.

REWARDS = torch.tensor([[1.0, -2.0], [0.5, 3.0]], dtype=torch.float64)
"""Of the four sequences of two binary tokens."""


def policy(first: float, after_zero: float, after_one: float) -> Tensor:
    """Three logits of token 1: of the first token, and of the second after a 0 and after a 1."""
    return torch.tensor([first, after_zero, after_one], dtype=torch.float64)


def logprobs(logits: Tensor, first: int, second: int) -> Tensor:
    signs = (2.0 * first - 1, 2.0 * second - 1)
    return torch.stack(
        [torch.nn.functional.logsigmoid(s * x) for s, x in zip(signs, (logits[0], logits[1 + first]), strict=True)]
    )


def expected_gradient(learner: Tensor, sampler: Tensor, config: Importance, *, num_tokens: int) -> Tensor:
    """Of the loss on sequences drawn from `sampler`, all of them enumerated: each weighs its probability there."""
    learner = learner.clone().requires_grad_()
    for first, second in itertools.product((0, 1), repeat=2):
        ours, drawn = logprobs(learner, first, second)[:num_tokens], logprobs(sampler, first, second)
        index = torch.zeros(num_tokens, dtype=torch.int64)
        advantages = torch.full((num_tokens,), float(reward(first, second, num_tokens)), dtype=torch.float64)
        token_loss = ALGORITHMS["grpo"].token_loss(
            ours, ours.detach(), advantages=advantages, sample_index=index, clip_low=0.2, clip_high=0.2
        )
        weights, _ = importance_weights(ours, drawn[:num_tokens], sample_index=index, importance=config)
        share = drawn.sum().exp().expand(num_tokens)
        weighted_loss(token_loss, share, importance_weights=weights.double()).backward()
    assert learner.grad is not None
    return learner.grad


def reward(first: int, second: int, num_tokens: int) -> Tensor:
    return REWARDS[first, second] if num_tokens == 2 else REWARDS[first].sum()


def on_policy_gradient(learner: Tensor, *, num_tokens: int) -> Tensor:
    """Of minus the expected reward, by definition."""
    learner = learner.clone().requires_grad_()
    sequences = itertools.product((0, 1), repeat=2)
    value = sum(reward(a, b, num_tokens) * logprobs(learner, a, b).sum().exp() for a, b in sequences)
    [gradient] = torch.autograd.grad(-value, learner)  # type: ignore[arg-type]
    return gradient


NEW, OLD = policy(0.3, -0.4, 0.8), policy(-0.2, 0.5, 0.1)


@pytest.mark.parametrize(("level", "num_tokens"), [("token", 1), ("sequence", 1), ("geometric", 1), ("sequence", 2)])
def test_a_weighted_stale_gradient_is_the_on_policy_gradient(level: str, num_tokens: int) -> None:
    config = Importance.model_validate({"level": level, "clip_max": 100.0})
    stale = expected_gradient(NEW, OLD, config, num_tokens=num_tokens)
    torch.testing.assert_close(stale, on_policy_gradient(NEW, num_tokens=num_tokens), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("level", ["none", "token", "geometric"])
def test_over_a_sequence_the_other_levels_are_biased(level: str) -> None:
    config = Importance.model_validate({"level": level, "clip_max": 100.0})
    bias = expected_gradient(NEW, OLD, config, num_tokens=2) - on_policy_gradient(NEW, num_tokens=2)
    assert bias.norm() > 0.01
