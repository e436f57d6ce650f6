"""Samples that lack what their sampler knew: named and refused, or trained on with the learner's own logprobs."""

import pytest
import torch

from syncline.config.schema import Learner, Loss
from syncline.errors import TrainingError
from syncline.learner.packing import pack
from syncline.learner.unrecorded import refuse_unrecorded, replace_unknown
from syncline.types import Lack, Rollout, RolloutGroup, RolloutStatus, TrainingSample, VersionSpan

RECORDED = TrainingSample((5, 6, 7), (False, True, True), (0.0, -0.5, -0.25), (VersionSpan(0, 1, 3),))
UNRECORDED = TrainingSample((5, 6, 7), (False, True, True), (0.0, 0.0, 0.0), (), (Lack.VERSIONS, Lack.LOGPROBS))


def group(*samples: TrainingSample) -> RolloutGroup:
    rollouts = tuple(Rollout((sample,), float(i), RolloutStatus.COMPLETED) for i, sample in enumerate(samples))
    return RolloutGroup("g", "digits", 0, rollouts)


def test_they_are_refused_by_name_unless_accepted() -> None:
    mixed = group(RECORDED, UNRECORDED)
    with pytest.raises(TrainingError, match=r"'digits', rollout 1: .* no versions and no logprobs; set learner.unre"):
        refuse_unrecorded([mixed], Learner())
    refuse_unrecorded([group(RECORDED)], Learner())
    refuse_unrecorded([mixed], Learner(unrecorded="accept"))


def test_what_was_not_recorded_is_what_the_learner_has_and_the_rest_is_the_samplers() -> None:
    [batch] = pack(
        [group(RECORDED, UNRECORDED)], {"g": [1.0, -1.0]}, token_budget=100, loss=Loss(), max_completion_tokens=8
    )
    logprobs = torch.tensor([-1.0, -2.0, -3.0, -4.0], requires_grad=True)
    replaced = replace_unknown(batch.sampler_logprobs, logprobs)
    assert replaced.tolist() == [-0.5, -0.25, -3.0, -4.0]
    assert not replaced.requires_grad
