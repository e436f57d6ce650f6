"""Corrects for tokens that were not drawn from the policy being trained: truncated or masked importance sampling.

Two gaps are one here. The kernels of engine and learner round differently on the same weights, and a token may be
`run.max_staleness` versions old. Every token carries the log-probability it was drawn with, under the version that drew
it, so a sample that outlived a publish is corrected piece by piece, each with its own version.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from syncline.config.schema import Importance, SequenceMask
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
    weight_square_sum: Tensor
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
            weight_square_sum=self.weight_square_sum + other.weight_square_sum,
            weight_min=torch.minimum(self.weight_min, other.weight_min),
            weight_max=torch.maximum(self.weight_max, other.weight_max),
            difference_sum=self.difference_sum + other.difference_sum,
            difference_max=torch.maximum(self.difference_max, other.difference_max),
            k3_sum=self.k3_sum + other.k3_sum,
        )

    def metrics(self) -> dict[str, float]:
        """TRL's keys where it has one. The ratio is the weight applied, after clipping or masking, as TRL's is.

        `ess` is Kish's effective sample size as a share of the tokens, (sum w)^2 / (N sum w^2): 1 when all weigh the
        same, 0 when none is left.
        """
        total, squares = self.weight_sum.item(), self.weight_square_sum.item()
        return {
            "sampling/importance_sampling_ratio/min": self.weight_min.item(),
            "sampling/importance_sampling_ratio/mean": total / self.num_tokens,
            "sampling/importance_sampling_ratio/max": self.weight_max.item(),
            "sampling/importance_sampling_ratio/ess": total**2 / (self.num_tokens * squares) if squares else 0.0,
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

    With the learner's policy pi, the sampler's mu and a sample y, the ratio r of its token t is by `level`

        token      pi(y_t | y_<t) / mu(y_t | y_<t)              unbiased for one token, biased over a sequence
        sequence   product over t of the token ratios           unbiased (TRL's and verl's "sequence")
        geometric  that product to the power 1 / |y|            biased, but no wider for long samples than for short
                                                                (verl's "geometric"; GSPO's ratio, 2507.18071 eq. 7)

    and the weight by `mode`, on the band from a = `clip_min` to b = `clip_max`,

        truncate   min(max(r, a), b)        TIS: Ionides, "Truncated Importance Sampling", 2008, with a = 0
        mask       r where a <= r <= b, else 0    MIS: IcePop's two-sided band, arXiv 2510.18855; with a = 0 one-sided

    A masked token still counts in the loss's normaliser. Level `none` weighs every token 1. With `sequence_mask`, the
    tokens of a sample whose own ratio, of that mask's level, is outside of that mask's band weigh 0 too.
    """
    difference = learner_logprobs.detach().float() - sampler_logprobs.float()
    ratio = _ratio(difference, sample_index, importance.level)
    inside = _inside(ratio, importance)
    if importance.mode == "truncate":
        weights = ratio.clamp(importance.clip_min, importance.clip_max)
    else:
        weights = torch.where(inside, ratio, 0.0)
    if mask := importance.sequence_mask:
        kept = _inside(_ratio(difference, sample_index, mask.level), mask)
        weights, inside = torch.where(kept, weights, 0.0), inside & kept
    return weights, _tally(difference, weights, inside)


def _ratio(difference: Tensor, sample_index: Tensor, level: str) -> Tensor:
    """learner / sampler of each token, sample or geometric mean, `[N]`."""
    log_ratio = difference
    if level == "none":
        log_ratio = torch.zeros_like(difference)
    elif level in ("sequence", "geometric"):
        log_ratio = sum_over_sample(difference, sample_index)
    if level == "geometric":
        log_ratio = log_ratio / sum_over_sample(torch.ones_like(difference), sample_index)
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def _inside(ratio: Tensor, band: Importance | SequenceMask) -> Tensor:
    return (ratio >= band.clip_min) & (ratio <= band.clip_max)


def _tally(difference: Tensor, weights: Tensor, inside: Tensor) -> ImportanceTally:
    bounded = difference.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return ImportanceTally(
        num_tokens=difference.numel(),
        num_kept=inside.sum(),
        weight_sum=weights.sum(),
        weight_square_sum=weights.square().sum(),
        weight_min=weights.min(),
        weight_max=weights.max(),
        difference_sum=difference.abs().sum(),
        difference_max=difference.abs().max(),
        k3_sum=(bounded.exp() - bounded - 1).sum(),
    )
