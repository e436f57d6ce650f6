import json
import math
from pathlib import Path

import pytest
import torch

from syncline.learner.losses import (
    ALGORITHMS,
    BatchCounts,
    clip_tally,
    k3_kl,
    sequence_ratio,
    token_ratio,
    weighted_loss,
)

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "losses.json").read_text())
ROWS = [
    pytest.param(name, table, row, id=f"{name}-{table_name}-A{row['advantage']}-r{row['ratio']}")
    for table_name, table in GOLDEN["tables"].items()
    for name in table["losses"]
    for row in table["rows"]
]


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_the_tables_cover_every_loss() -> None:
    assert {name for table in GOLDEN["tables"].values() for name in table["losses"]} == set(ALGORITHMS)


@pytest.mark.parametrize(("name", "table", "row"), ROWS)
def test_value_and_gradient_match_the_hand_worked_table(name: str, table: dict, row: dict) -> None:
    policy = tensor(table["policy_logprob"]).requires_grad_()
    old = policy.detach() - math.log(row["ratio"])
    loss = ALGORITHMS[name].token_loss(
        policy,
        old,
        advantages=tensor(row["advantage"]),
        sample_index=torch.tensor([0]),
        clip_low=table["clip_low"],
        clip_high=table["clip_high"],
    )
    [gradient] = torch.autograd.grad(loss.sum(), policy)
    assert loss.item() == pytest.approx(row["loss"], abs=1e-12)
    assert gradient.item() == pytest.approx(row["gradient"], abs=1e-12)


@pytest.mark.parametrize("row", GOLDEN["weights"]["rows"], ids=lambda row: row["loss"])
def test_token_weights_match_the_hand_worked_table(row: dict) -> None:
    lengths = GOLDEN["weights"]["rollout_lengths"]
    counts = BatchCounts(len(lengths), sum(lengths), GOLDEN["weights"]["max_completion_tokens"])
    assert [ALGORITHMS[row["loss"]].token_weight(length, counts) for length in lengths] == row["weights"]


@pytest.mark.parametrize("row", GOLDEN["k3"]["rows"], ids=lambda row: str(row["ref_over_policy"]))
def test_k3_value_and_gradient_match_the_hand_worked_table(row: dict) -> None:
    policy = tensor(-3.0).requires_grad_()
    kl = k3_kl(policy, policy.detach() + math.log(row["ref_over_policy"]))
    [gradient] = torch.autograd.grad(kl.sum(), policy)
    assert kl.item() == pytest.approx(row["k3"], abs=1e-12)
    assert gradient.item() == pytest.approx(row["gradient"], abs=1e-12)


def test_the_kls_gradient_is_the_reverse_kls_with_the_ratio_and_the_forward_kls_without() -> None:
    """The expectation over a vocabulary of five, of an older policy with the ratio, written out."""
    torch.manual_seed(0)
    logits, reference, older = torch.randn(3, 5, dtype=torch.float64).unbind()
    policy, none = logits.requires_grad_().log_softmax(-1), torch.zeros(5, dtype=torch.int64)
    reference, older = reference.log_softmax(-1), older.log_softmax(-1)

    def gradient(expectation: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(expectation, logits, retain_graph=True)[0]

    kl = k3_kl(policy, reference)
    reverse = gradient((older.exp() * kl * token_ratio(policy, older, none)).sum())
    torch.testing.assert_close(reverse, gradient((policy.exp() * (policy - reference)).sum()))
    forward = gradient((policy.detach().exp() * kl).sum())
    torch.testing.assert_close(forward, gradient((reference.exp() * (reference - policy)).sum()))


def test_sequence_ratio_is_the_geometric_mean_of_each_sample() -> None:
    # sample 0: token ratios 4 and 1, mean sqrt(4) = 2; sample 1: token ratio 3.
    old = tensor(-1, -1, -1)
    policy = old + tensor(math.log(4), 0, math.log(3))
    ratio = sequence_ratio(policy, old, torch.tensor([0, 0, 1]))
    torch.testing.assert_close(ratio, tensor(2, 2, 3))


def test_gspo_has_the_gradient_of_the_papers_sequence_objective() -> None:
    """Against eq. 5 and 7 written down plainly, a mean over two sequences; the second one is clipped."""
    old = tensor(-1.0, -2.0, -0.5, -1.5, -0.7)
    policy = (old + tensor(0.3, -0.2, 0.1, 0.9, 0.4)).requires_grad_()
    index, advantages = torch.tensor([0, 0, 0, 1, 1]), tensor(-1.0, -1.0, -1.0, 2.0, 2.0)
    first, second = (policy[:3] - old[:3]).mean().exp(), (policy[3:] - old[3:]).mean().exp()
    paper = -(torch.minimum(-first, -first.clamp(0.8, 1.2)) + torch.minimum(2 * second, 2 * second.clamp(0.8, 1.2))) / 2
    ours = ALGORITHMS["gspo"].token_loss(
        policy, old, advantages=advantages, sample_index=index, clip_low=0.2, clip_high=0.2
    )
    weights = tensor(1 / 6, 1 / 6, 1 / 6, 1 / 4, 1 / 4)
    loss = weighted_loss(ours, weights, importance_weights=torch.ones(5))
    [expected] = torch.autograd.grad(paper, policy)
    [gradient] = torch.autograd.grad(loss, policy)
    torch.testing.assert_close(loss, paper)
    torch.testing.assert_close(gradient, expected)
    assert expected[0] != 0
    assert expected[3] == 0


def test_importance_weighs_the_policy_loss_and_not_the_kl() -> None:
    # 0.5 * (3 * 1 + 0.1 * 10) + 0.25 * (0 * 2 + 0.1 * 20) = 2 + 0.5
    loss = weighted_loss(
        tensor(1, 2), tensor(0.5, 0.25), importance_weights=tensor(3, 0), kl=tensor(10, 20), kl_coef=0.1
    )
    assert loss.item() == pytest.approx(2.5)


def test_clip_tally_counts_by_sign_and_adds_up() -> None:
    # Low: ratio 0.5 with A < 0. High: ratio 2 with A > 0, twice. The others are outside where nothing is clipped.
    clip = {"clip_low": 0.2, "clip_high": 0.2}
    first = clip_tally(tensor(0.5, 0.5, 2), tensor(-1, 1, 1), sample_index=torch.tensor([0, 0, 1]), **clip)
    second = clip_tally(tensor(2, 2), tensor(-1, 1), sample_index=torch.tensor([0, 0]), **clip)
    assert (first + second).metrics() == {
        "clip_ratio/low_mean": 1 / 5,
        "clip_ratio/high_mean": 2 / 5,
        "clip_ratio/region_mean": pytest.approx(3 / 5),
        "clip_ratio/low_min": 0,  # samples have 1/2, 0 and 0
        "clip_ratio/high_max": 1,  # and 0, 1 and 1/2
    }


def test_extremes_of_clipping_are_of_samples_however_they_are_batched() -> None:
    ratio, advantages, samples = tensor(0.5, 1, 0.5, 0.5, 2), tensor(-1, -1, -1, -1, 1), torch.tensor([0, 0, 1, 1, 2])
    clip = {"clip_low": 0.2, "clip_high": 0.2}
    whole = clip_tally(ratio, advantages, sample_index=samples, **clip).metrics()
    apart = [
        clip_tally(ratio[samples == i], advantages[samples == i], sample_index=samples[samples == i] - i, **clip)
        for i in range(3)
    ]
    assert whole == (apart[0] + apart[1] + apart[2]).metrics()
    assert (whole["clip_ratio/low_min"], whole["clip_ratio/high_max"]) == (0, 1)
