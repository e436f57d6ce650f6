from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from syncline.config.schema import Loss
from syncline.errors import ConfigError
from syncline.learner.losses import ALGORITHMS
from syncline.learner.packing import PackedBatch, Share, pack, pack_samples
from syncline.types import Rollout, RolloutGroup, RolloutStatus, TrainingSample, VersionSpan

TRUNCATED = RolloutStatus.TRUNCATED


def sample(first_token: int, mask: str) -> TrainingSample:
    """`"..##."`: a dot for a token given, a hash for one sampled. Token i is `first_token + i`, its logprob `-i`."""
    sampled = tuple(mark == "#" for mark in mask)
    return TrainingSample(
        token_ids=tuple(range(first_token, first_token + len(mask))),
        loss_mask=sampled,
        logprobs=tuple(-float(i) if s else 0.0 for i, s in enumerate(sampled)),
        versions=tuple(VersionSpan(0, i, i + 1) for i, s in enumerate(sampled) if s),
    )


def rollout(*samples: TrainingSample, status: RolloutStatus = RolloutStatus.COMPLETED) -> Rollout:
    return Rollout(samples, None if status is RolloutStatus.ERROR else 1.0, status)


def packed(*rollouts: Rollout, budget: int = 100, longest: int = 8, loss: Loss | None = None) -> Sequence[PackedBatch]:
    group = RolloutGroup("g", "task", 0, rollouts)
    advantages = {"g": tuple(float(i + 1) for i in range(len(rollouts)))}
    return pack([group], advantages, loss=loss or Loss(), token_budget=budget, max_completion_tokens=longest)


def test_a_batch_worked_by_hand() -> None:
    # Two rollouts: 10 11 [12 13], and 20 [21] 22 [23] 24. Each is read up to the token before its last sampled one.
    [batch] = packed(rollout(sample(10, "..##")), rollout(sample(20, ".#.#.")))
    assert batch.token_ids.tolist() == [10, 11, 12, 20, 21, 22]
    assert batch.position_ids.tolist() == [0, 1, 2, 0, 1, 2]
    assert (batch.cu_seqlens.tolist(), batch.cu_seqlens.dtype, batch.max_seqlen) == ([0, 3, 6], torch.int32, 3)
    assert batch.predict_index.tolist() == [1, 2, 3, 5]
    assert batch.labels.tolist() == [12, 13, 21, 23]
    assert batch.sampler_logprobs.tolist() == [-2, -3, -1, -3]
    assert batch.sample_index.tolist() == [0, 0, 1, 1]
    assert batch.advantages.tolist() == [1, 1, 2, 2]
    assert batch.loss_weights.tolist() == [0.25] * 4
    assert (batch.num_tokens, batch.num_labels) == (6, 4)


def test_a_rollouts_length_sums_over_its_samples() -> None:
    [batch] = packed(rollout(sample(0, ".###"), sample(10, ".#")), rollout(sample(20, ".##")))
    weights = {"3 + 1 tokens": 1 / (2 * 4), "2 tokens": 1 / (2 * 2)}
    torch.testing.assert_close(batch.loss_weights, torch.tensor([*[weights["3 + 1 tokens"]] * 3, 1 / 4, 1 / 4, 1 / 8]))
    assert batch.labels.tolist() == [1, 2, 3, 21, 22, 11]


def test_what_stays_out_of_the_loss_is_not_counted_by_the_normaliser() -> None:
    left_out = (
        rollout(sample(20, ".##"), status=RolloutStatus.ERROR),
        rollout(sample(30, "...")),
        rollout(sample(40, ".###"), status=TRUNCATED),
    )
    [batch] = packed(rollout(sample(10, ".##")), *left_out, loss=Loss(mask_truncated=True))
    assert batch.labels.tolist() == [11, 12]
    assert batch.loss_weights.tolist() == [0.5, 0.5]


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_rollout_of_weight_two_counts_as_two_of_it_and_of_weight_zero_not_at_all(name: str) -> None:
    once, other = rollout(sample(10, ".##")), rollout(sample(20, ".#"))
    loss, longest = Loss.model_validate({"name": name}), 8
    [twice] = packed(once, once, other, loss=loss, longest=longest)
    [weighted] = packed(replace(once, weight=2.0), other, replace(other, weight=0.0), loss=loss, longest=longest)
    assert twice.labels.tolist() == [11, 12, 11, 12, 21]
    assert weighted.labels.tolist() == [11, 12, 21]
    expected = torch.cat([twice.loss_weights[:2] + twice.loss_weights[2:4], twice.loss_weights[4:]])
    torch.testing.assert_close(weighted.loss_weights, expected)


def test_weights_by_hand() -> None:
    # Lengths 2 and 1, weights 3 and 1: a mean over tokens divides by 3 * 2 + 1 = 7, one over rollouts by 3 + 1 = 4.
    rollouts = replace(rollout(sample(10, ".##")), weight=3.0), rollout(sample(20, ".#"))
    [over_tokens] = packed(*rollouts, loss=Loss(name="dapo"))
    torch.testing.assert_close(over_tokens.loss_weights, torch.tensor([3 / 7, 3 / 7, 1 / 7]))
    [over_rollouts] = packed(*rollouts, loss=Loss(name="grpo"))
    torch.testing.assert_close(over_rollouts.loss_weights, torch.tensor([3 / 8, 3 / 8, 1 / 4]))


def test_truncated_rollouts_are_trained_on_unless_masked() -> None:
    cut = rollout(sample(10, ".##"), status=TRUNCATED)
    assert packed(cut)[0].num_labels == 2
    assert len(packed(cut, loss=Loss(mask_truncated=True))) == 0


def test_first_fit_decreasing() -> None:
    # Read lengths 3 1 4 2, budget 5: 4+1, 3+2.
    masks = ("...#", ".#", "....#", "..#")
    batches = packed(*(rollout(sample(10 * i, mask)) for i, mask in enumerate(masks)), budget=5)
    assert [batch.cu_seqlens.tolist() for batch in batches] == [[0, 4, 5], [0, 3, 5]]
    assert [batch.labels.tolist() for batch in batches] == [[24, 11], [3, 32]]


@pytest.mark.parametrize(
    ("lengths", "budget", "expected"),
    [
        ((1, 2, 3, 4), 9, [[4, 1], [3, 2]]),  # first fit: 4 3 2 and a lone 1
        ((3, 3, 2, 2, 2), 6, [[3, 3], [2, 2, 2]]),  # the even way, 3 2 2 and 3 2, is over the budget
        ((5, 5, 1), 5, [[5], [5], [1]]),
    ],
)
def test_microbatches_are_few_first_and_then_even(
    lengths: tuple[int, ...], budget: int, expected: list[list[int]]
) -> None:
    batches = packed(*(rollout(sample(10 * i, "." + "#" * n)) for i, n in enumerate(lengths)), budget=budget)
    assert [batch.cu_seqlens.diff().tolist() for batch in batches] == expected
    assert [batch.max_seqlen for batch in batches] == [members[0] for members in expected]


def test_a_sequence_above_the_budget_is_named() -> None:
    with pytest.raises(ConfigError, match=r"token_budget: 3 is below the 4 tokens of group 'g' rollout 1 sample 0"):
        packed(rollout(sample(0, ".#")), rollout(sample(10, "....#")), budget=3)


def test_advantages_of_another_group_size_are_refused() -> None:
    group = RolloutGroup("g", "task", 0, (rollout(sample(0, ".#")),))
    with pytest.raises(ValueError, match="zip"):
        pack([group], {"g": (1.0, 2.0)}, loss=Loss(), token_budget=9, max_completion_tokens=9)


def test_samples_are_packed_for_scoring_without_a_loss() -> None:
    batches = pack_samples([sample(0, ".#"), sample(10, "..##"), sample(20, "..")], token_budget=3)
    assert [batch.labels.tolist() for batch in batches] == [[12, 13], [1]]
    assert all(batch.loss_weights.eq(0).all() and batch.advantages.eq(0).all() for batch in batches)


@given(
    masks=st.lists(st.text("#.", max_size=8).map(lambda rest: "." + rest), min_size=1, max_size=12),
    budget=st.integers(8, 40),
    name=st.sampled_from(["grpo", "dr_grpo", "dapo", "gspo"]),
)
def test_any_budget_holds_the_same_tokens_with_the_same_weights(masks: list[str], budget: int, name: str) -> None:
    rollouts = [rollout(sample(100 * i, mask)) for i, mask in enumerate(masks)]
    loss = Loss.model_validate({"name": name})

    def contents(batches: Sequence[PackedBatch]) -> list[tuple[float, ...]]:
        columns = ("labels", "sampler_logprobs", "advantages", "loss_weights")
        return sorted(row for b in batches for row in zip(*(getattr(b, c).tolist() for c in columns), strict=True))

    small, whole = packed(*rollouts, budget=budget, loss=loss), packed(*rollouts, budget=1000, loss=loss)
    assert contents(small) == contents(whole)
    assert [row[0] for row in contents(whole)] == [
        100 * i + j for i, mask in enumerate(masks) for j, mark in enumerate(mask) if mark == "#"
    ]
    for batch in small:
        assert batch.num_tokens <= budget
        assert (batch.token_ids[batch.predict_index] + 1).tolist() == batch.labels.tolist()


def shares(*lengths: int, of: int, budget: int) -> list[list[list[int]]]:
    """Each rank's micro-batches as the labels they train on, none for idle ones. Sequence i begins at 1000 i."""
    rollouts = tuple(rollout(sample(1000 * i, "." + "#" * length)) for i, length in enumerate(lengths, start=1))
    group, advantages = RolloutGroup("g", "task", 0, rollouts), {"g": (1.0,) * len(rollouts)}
    options: dict[str, Any] = {"loss": Loss(), "token_budget": budget, "max_completion_tokens": 99}
    ranks = [pack([group], advantages, share=Share(index, of), **options) for index in range(of)]
    assert all(batch.num_tokens <= budget for rank in ranks for batch in rank)
    return [[[] if batch.idle else batch.labels.tolist() for batch in rank] for rank in ranks]


@pytest.mark.parametrize("of", [2, 3, 5])
def test_ranks_share_every_token_once_in_as_many_micro_batches_of_about_the_same_length(of: int) -> None:
    lengths = (19, 3, 7, 20, 11, 5, 5, 16, 2, 8, 13, 9, 4)
    ranks = shares(*lengths, of=of, budget=20)
    labels = sorted(label for rank in ranks for batch in rank for label in batch)
    assert labels == sorted(1000 * i + 1 + j for i, length in enumerate(lengths, start=1) for j in range(length))
    assert len({len(rank) for rank in ranks}) == 1
    totals = [sum(map(len, rank)) for rank in ranks]
    assert max(totals) - min(totals) <= max(lengths)
    for at_once in zip(*ranks, strict=True):
        assert max(map(len, at_once)) - min(map(len, at_once)) <= 10, "they wait for each other"


def test_a_rank_without_tokens_computes_some_that_weigh_nothing() -> None:
    assert shares(6, of=3, budget=20) == [[[1001, 1002, 1003, 1004, 1005, 1006]], [[]], [[]]]
    group = RolloutGroup("g", "task", 0, (rollout(sample(5, ".##")),))
    [idle] = pack([group], {"g": (1.0,)}, loss=Loss(), token_budget=9, max_completion_tokens=9, share=Share(1, 2))
    assert idle.loss_weights.tolist() == [0.0]
    assert idle.sampler_logprobs.isnan().all(), "as the learner's own: a ratio of 1"


def test_nothing_to_train_on_is_nothing_for_any_rank() -> None:
    failed = RolloutGroup("g", "task", 0, (rollout(status=RolloutStatus.ERROR),))
    options: dict[str, Any] = {"loss": Loss(), "token_budget": 9, "max_completion_tokens": 9}
    assert [len(pack([failed], {"g": (0.0,)}, share=Share(i, 2), **options)) for i in range(2)] == [0, 0]
