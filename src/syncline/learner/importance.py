"""Corrects for the gap between the engine's probabilities and the learner's on the same tokens and weights.

Truncated (TIS) or masked (MIS) importance sampling, by token or by sample; the kernels of engine and learner round
differently, and one step of staleness adds to it. The same numbers, uncorrected, say how wide the gap is.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from syncline.config.schema import Importance
from syncline.learner.losses import sum_over_sample

MAX_LOG_RATIO = 20.0
"""Keeps exp finite in float32; far beyond any sensible `clip_max`."""


@dataclass(frozen=True, slots=True)
class ImportanceTally:
    """Sums and extremes over tokens, so that micro-batches add up exactly.

    0-d tensors: nothing waits for the device.
    """

    num_tokens: int
    num_kept: Tensor
    """Tokens whose ratio lay inside the bounds."""
    weight_sum: Tensor
    weight_min: Tensor
    weight_max: Tensor
    difference_sum: Tensor
    """Of |learner - sampler| logprobs."""
    difference_max: Tensor
    k3_sum: Tensor

    def __add__(self, other: "ImportanceTally") -> "ImportanceTally":
        return ImportanceTally(
            num_tokens=self.num_tokens + other.num_tokens,
            num_kept=self.num_kept + other.num_kept,
            weight_sum=self.weight_sum + other.weight_sum,
            weight_min=torch.minimum(self.weight_min, other.weight_min),
            weight_max=torch.maximum(self.weight_max, other.weight_max),
            difference_sum=self.difference_sum + other.difference_sum,
            difference_max=torch.maximum(self.difference_max, other.difference_max),
            k3_sum=self.k3_sum + other.k3_sum,
        )

    def metrics(self) -> dict[str, float]:
        """TRL's keys where it has one. The ratio is the weight applied, after clipping or masking, as TRL's is."""
        return {
            "sampling/importance_sampling_ratio/min": self.weight_min.item(),
            "sampling/importance_sampling_ratio/mean": self.weight_sum.item() / self.num_tokens,
            "sampling/importance_sampling_ratio/max": self.weight_max.item(),
            "sampling/sampling_logp_difference/mean": self.difference_sum.item() / self.num_tokens,
            "sampling/sampling_logp_difference/max": self.difference_max.item(),
            "sampling/kept_ratio": self.num_kept.item() / self.num_tokens,
            "sampling/k3_kl": self.k3_sum.item() / self.num_tokens,
        }


@torch.no_grad()
def importance_weights(
    learner_logprobs: Tensor, sampler_logprobs: Tensor, *, sample_index: Tensor, importance: Importance
) -> tuple[Tensor, ImportanceTally]:
    """Weights `[N]` (constants to autograd) and the tally of a micro-batch, of at least one token.

    The ratio is learner / sampler of the token, or the product over its sample. `truncate` clamps it to
    `[clip_min, clip_max]` (Ionides, 2008), `mask` sets it to 0 outside; level `none` weighs every token 1.
    """
    difference = learner_logprobs.detach().float() - sampler_logprobs.float()
    log_ratio = sum_over_sample(difference, sample_index) if importance.level == "sequence" else difference
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    inside = (ratio >= importance.clip_min) & (ratio <= importance.clip_max)
    if importance.level == "none":
        weights, inside = torch.ones_like(ratio), torch.ones_like(inside)
    elif importance.mode == "truncate":
        weights = ratio.clamp(importance.clip_min, importance.clip_max)
    else:
        weights = torch.where(inside, ratio, 0.0)
    return weights, _tally(difference, weights, inside)


def _tally(difference: Tensor, weights: Tensor, inside: Tensor) -> ImportanceTally:
    bounded = difference.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return ImportanceTally(
        num_tokens=difference.numel(),
        num_kept=inside.sum(),
        weight_sum=weights.sum(),
        weight_min=weights.min(),
        weight_max=weights.max(),
        difference_sum=difference.abs().sum(),
        difference_max=difference.abs().max(),
        k3_sum=(bounded.exp() - bounded - 1).sum(),
    )
