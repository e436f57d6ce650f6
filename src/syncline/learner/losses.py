"""The policy losses, one small function each, and the one dict that names them.

A loss is three choices: which ratio (of a token, or of its whole sample), which objective of ratio and advantage, and
what one token weighs. The weights divide by counts of the whole optimizer step, taken before any micro-batch runs, so

    loss = sum over tokens of loss_weight * (importance_weight * token_loss + kl_coef * kl)

has the same gradient however the tokens are split into micro-batches. Tensors are 1-D over the sampled tokens, `[N]`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

import torch
from torch import Tensor

from syncline.config.schema import Loss


class Ratio(Protocol):
    def __call__(self, policy_logprobs: Tensor, old_logprobs: Tensor, sample_index: Tensor) -> Tensor: ...


class Objective(Protocol):
    def __call__(
        self, ratio: Tensor, advantages: Tensor, policy_logprobs: Tensor, *, clip_low: float, clip_high: float
    ) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class BatchCounts:
    """What the losses divide by, over all rollouts an optimizer step trains on, each counted by its weight."""

    num_rollouts: float
    num_tokens: float
    """Sampled tokens."""
    max_completion_tokens: int
    """The longest completion the run allows."""


@dataclass(frozen=True, slots=True)
class Algorithm:
    ratio: Ratio
    objective: Objective
    token_weight: Callable[[int, BatchCounts], float]
    """Loss weight of a token in a rollout of weight 1, from the sampled tokens of its rollout and the step's counts."""

    def token_loss(
        self,
        policy_logprobs: Tensor,
        old_logprobs: Tensor,
        *,
        advantages: Tensor,
        sample_index: Tensor,
        clip_low: float,
        clip_high: float,
    ) -> Tensor:
        """Loss of each token `[N]`, not weighted.

        `sample_index[i]` says which sample of the micro-batch token i is of.
        """
        ratio = self.ratio(policy_logprobs, old_logprobs, sample_index)
        return self.objective(ratio, advantages, policy_logprobs, clip_low=clip_low, clip_high=clip_high)


def token_ratio(policy_logprobs: Tensor, old_logprobs: Tensor, sample_index: Tensor) -> Tensor:
    """policy / old, token by token."""
    return (policy_logprobs - old_logprobs).exp()


def sequence_ratio(policy_logprobs: Tensor, old_logprobs: Tensor, sample_index: Tensor) -> Tensor:
    """The geometric mean of a sample's token ratios, on every token of it (GSPO, arXiv 2507.18071 eq. 7).

    Differentiated token by token (GSPO-token, §4.3): the same gradient as eq. 10, since one advantage serves the
    sample, and a token's importance weight acts on that token's gradient alone.
    """
    log_ratio = (policy_logprobs - old_logprobs).detach()
    length = sum_over_sample(torch.ones_like(log_ratio), sample_index)
    mean = sum_over_sample(log_ratio, sample_index) / length
    return (mean + policy_logprobs - policy_logprobs.detach()).exp()


def clipped_surrogate(
    ratio: Tensor, advantages: Tensor, policy_logprobs: Tensor, *, clip_low: float, clip_high: float
) -> Tensor:
    """-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A): PPO, arXiv 1707.06347 eq. 7, right for both signs of A."""
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    return -torch.minimum(ratio * advantages, clipped * advantages)


def clipped_weight(
    ratio: Tensor, advantages: Tensor, policy_logprobs: Tensor, *, clip_low: float, clip_high: float
) -> Tensor:
    """-clip(r) A log pi, the clipped ratio a constant, so no token loses its gradient: CISPO, arXiv 2506.13585 eq.

    4-5.
    """
    return -ratio.detach().clamp(1 - clip_low, 1 + clip_high) * advantages * policy_logprobs


def mean_over_rollouts(rollout_length: int, counts: BatchCounts) -> float:
    """Every rollout counts the same; its tokens share its part."""
    return 1 / (counts.num_rollouts * rollout_length)


def by_longest_completion(rollout_length: int, counts: BatchCounts) -> float:
    """A constant, so that a long wrong answer is not cheaper per token (Dr. GRPO, arXiv 2503.20783 §3.2)."""
    return 1 / (counts.num_rollouts * counts.max_completion_tokens)


def mean_over_tokens(rollout_length: int, counts: BatchCounts) -> float:
    """Every token counts the same (DAPO, arXiv 2503.14476 §3.3).

    bnpo divides by the tokens of its batch. TRL takes the micro-batch's for it, so that its gradient depends on how the
    batch was split; with the step's, the only exact choice, bnpo and dapo have one normaliser. dapo's other difference
    is a `clip_high` above `clip_low`.
    """
    return 1 / counts.num_tokens


ALGORITHMS: Mapping[str, Algorithm] = MappingProxyType(
    {
        "grpo": Algorithm(token_ratio, clipped_surrogate, mean_over_rollouts),
        "dr_grpo": Algorithm(token_ratio, clipped_surrogate, by_longest_completion),
        "dapo": Algorithm(token_ratio, clipped_surrogate, mean_over_tokens),
        "bnpo": Algorithm(token_ratio, clipped_surrogate, mean_over_tokens),
        "gspo": Algorithm(sequence_ratio, clipped_surrogate, mean_over_rollouts),
        "cispo": Algorithm(token_ratio, clipped_weight, mean_over_tokens),
    }
)


def splits_by_token(loss: Loss) -> bool:
    """Whether a token's part in the loss depends on no other token's log-probability.

    The ratio of a sample does, but not where `old_logprobs` are the learner's own: then it is 1.
    """
    alone = ALGORITHMS[loss.name].ratio is token_ratio or loss.old_logprobs == "learner"
    return alone and loss.importance.level in ("none", "token") and loss.importance.sequence_mask is None


def k3_kl(policy_logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """KL(policy || reference) of each token, estimated on tokens of the policy: exp(d) - d - 1 with d = ref - policy.

    Never negative, unbiased (Schulman, "Approximating KL divergence", 2020, estimator k3). Its gradient is (1 - ref /
    policy) times the log-probability's, whose mean is the gradient of KL(reference || policy). Times the token's ratio
    to the policy that drew it, it is d(KL(policy || reference)), unbiased (DeepSeek-V3.2, arXiv 2512.02556 §3.1).
    """
    difference = ref_logprobs - policy_logprobs
    return difference.exp() - difference - 1


def weighted_loss(
    token_loss: Tensor,
    loss_weights: Tensor,
    *,
    importance_weights: Tensor,
    kl: Tensor | None = None,
    kl_coef: float = 0.0,
) -> Tensor:
    """This micro-batch's share of the step's loss, a scalar: to be summed, never averaged.

    The KL is not importance-weighted.
    """
    total = token_loss * importance_weights
    if kl is not None:
        total = total + kl_coef * kl
    return (total * loss_weights).sum()


def sum_over_sample(values: Tensor, sample_index: Tensor) -> Tensor:
    """Each token gets the sum over its sample: `[N]` to `[N]`.

    A sample has at least one token, so N bounds the samples.
    """
    return torch.zeros_like(values).index_add(0, sample_index, values)[sample_index]


@dataclass(frozen=True, slots=True)
class ClipTally:
    """Tokens whose objective the clip flattened (cispo: whose weight it capped), as counts that micro-batches add up
    exactly.
    """

    num_low: Tensor
    """Ratio below 1 - clip_low and a negative advantage."""
    num_high: Tensor
    """Ratio above 1 + clip_high and a positive advantage."""
    num_tokens: int
    low_min: Tensor
    """The smallest share of a sample; `high_max` is the largest."""
    high_max: Tensor

    def __add__(self, other: "ClipTally") -> "ClipTally":
        return ClipTally(
            self.num_low + other.num_low,
            self.num_high + other.num_high,
            self.num_tokens + other.num_tokens,
            torch.minimum(self.low_min, other.low_min),
            torch.maximum(self.high_max, other.high_max),
        )

    def metrics(self) -> dict[str, float]:
        """TRL's keys; the extremes are of the step's samples."""
        low, high = self.num_low.item() / self.num_tokens, self.num_high.item() / self.num_tokens
        means = {"clip_ratio/low_mean": low, "clip_ratio/high_mean": high, "clip_ratio/region_mean": low + high}
        return means | {"clip_ratio/low_min": self.low_min.item(), "clip_ratio/high_max": self.high_max.item()}


def clip_tally(
    ratio: Tensor, advantages: Tensor, *, sample_index: Tensor, clip_low: float, clip_high: float
) -> ClipTally:
    """Counts of a micro-batch; `ratio` `[N]` is the algorithm's own, N above 0."""
    low, high = (ratio < 1 - clip_low) & (advantages < 0), (ratio > 1 + clip_high) & (advantages > 0)
    length = sum_over_sample(torch.ones_like(ratio), sample_index)
    shares = (sum_over_sample(clipped.to(ratio.dtype), sample_index) / length for clipped in (low, high))
    return ClipTally(low.sum(), high.sum(), ratio.numel(), next(shares).min(), next(shares).max())
