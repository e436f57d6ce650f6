"""Samples that came without what the sampler knew: refused by name, or used with what the learner can put in place.

Environments of other frameworks send them. The learner can compute log-probabilities itself, as those of the policy it
trains now; how old the policy was that sampled, nobody can compute.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from syncline.config.schema import Learner
from syncline.errors import TrainingError
from syncline.types import Lack, RolloutGroup, TrainingSample

UNKNOWN = float("nan")


def refuse_unrecorded(groups: Sequence[RolloutGroup], config: Learner) -> None:
    """Raises `TrainingError` naming the first sample that lacks what `learner.unrecorded` wants recorded."""
    if config.unrecorded == "accept":
        return
    for group in groups:
        for i, rollout in enumerate(group.rollouts):
            for sample in rollout.samples:
                if sample.lacks:
                    raise TrainingError(
                        f"group {group.group_id!r} of {group.environment!r}, rollout {i}: its sampler recorded no "
                        f"{' and no '.join(sample.lacks)}; set learner.unrecorded = accept to train on it all the same"
                    )


def sampler_logprobs(sample: TrainingSample) -> tuple[float, ...]:
    """One a token; NaN where nobody recorded them, until `replace_unknown`."""
    return (UNKNOWN,) * len(sample.token_ids) if Lack.LOGPROBS in sample.lacks else sample.logprobs


def replace_unknown(sampler_logprobs: Tensor, logprobs: Tensor) -> Tensor:
    """`[N]`; what the sampler did not record is what the learner has: a ratio of 1."""
    return torch.where(sampler_logprobs.isnan(), logprobs.detach().to(sampler_logprobs.dtype), sampler_logprobs)
