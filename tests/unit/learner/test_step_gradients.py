"""A step's gradient is that of its loss written out over whole logits, for every loss, correction and chunk."""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import pytest
import torch
from test_microbatch_gradients import LOSSES, batches, groups, model, relative_error

from syncline.config.schema import Learner, Loss
from syncline.learner.advantages import group_advantages
from syncline.learner.importance import importance_weights
from syncline.learner.losses import ALGORITHMS, k3_kl, splits_by_token, weighted_loss
from syncline.learner.model import Reference, Scorer
from syncline.learner.packing import PackedBatch
from syncline.learner.step import Step
from syncline.observe.metrics import Metrics

CORRECTIONS: Mapping[str, dict[str, Any]] = {
    "none": {"level": "none"},
    "token, truncated": {"level": "token", "clip_min": 0.8, "clip_max": 1.1},
    "token, masked": {"level": "token", "mode": "mask", "clip_min": 0.8, "clip_max": 1.1},
    "sequence": {"level": "sequence", "clip_max": 1.5},
    "token, whole samples left out": {"level": "token", "sequence_mask": {"clip_min": 0.9, "clip_max": 1.05}},
}


def config(name: str, old: str, correction: str, kl_coef: float = 0.0) -> Loss:
    fields = {"name": name, "old_logprobs": old, "kl_coef": kl_coef, "importance": CORRECTIONS[correction]}
    return Loss.model_validate(fields | {"kl_ratio": name == "grpo"})


def reference(kl_coef: float) -> Reference | None:
    if not kl_coef:
        return None
    other = deepcopy(model())
    torch.manual_seed(1)
    for parameter in other.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return Reference(other.requires_grad_(False))


def logprobs_of(policy: Any, batch: PackedBatch) -> torch.Tensor:
    logits = policy(
        input_ids=batch.token_ids[None], position_ids=batch.position_ids[None], **batch.attention_kwargs()
    ).logits[0, batch.predict_index]
    return (logits / 0.9).log_softmax(-1).gather(1, batch.labels[:, None])[:, 0]


def written_out(loss: Loss, ref: Reference | None) -> tuple[float, torch.Tensor]:
    """The loss of one micro-batch that holds everything, and its gradient."""
    [batch] = batches(loss, 1000)
    model().zero_grad()
    logprobs = logprobs_of(model(), batch)
    old = logprobs.detach() if loss.old_logprobs == "learner" else batch.sampler_logprobs
    token_loss = ALGORITHMS[loss.name].token_loss(
        logprobs,
        old,
        advantages=batch.advantages,
        sample_index=batch.sample_index,
        clip_low=loss.clip_low,
        clip_high=loss.clip_high,
    )
    weights, _ = importance_weights(
        logprobs, batch.sampler_logprobs, sample_index=batch.sample_index, importance=loss.importance
    )
    kl = k3_kl(logprobs, logprobs_of(ref.model, batch)) if ref else None
    if kl is not None and loss.kl_ratio:
        kl = kl * (logprobs - old).exp()
    total = weighted_loss(token_loss, batch.loss_weights, importance_weights=weights, kl=kl, kl_coef=loss.kl_coef)
    total.backward()
    return total.item(), torch.cat([parameter.grad.flatten() for parameter in model().parameters()])


def of_step(loss: Loss, ref: Reference | None) -> tuple[float, torch.Tensor]:
    running = Learner(loss=loss, token_budget=17)
    step = Step(running, Scorer(0.9, 4), ref, torch.device("cpu"), max_completion_tokens=16, num_steps=2)
    model().zero_grad()
    report = Metrics()
    advantages = group_advantages(groups(), loss.scale_advantages)
    step.backward(model(), groups(), advantages, report, optimizer=None, step=0)  # type: ignore[arg-type]
    gradients = [parameter.grad.flatten() for parameter in model().parameters()]
    return report.reduced()["loss"], torch.cat(gradients)


@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("old", ["learner", "sampler"])
@pytest.mark.parametrize("name", LOSSES)
def test_the_gradient_is_that_of_the_loss_written_out(name: str, old: str, correction: str) -> None:
    loss = config(name, old, correction, kl_coef=0.05 if correction == "token, truncated" else 0.0)
    ref = reference(loss.kl_coef)
    expected, gradient = written_out(loss, ref)
    found, ours = of_step(loss, ref)
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert relative_error(ours, gradient) < 1e-5


def test_what_depends_on_other_tokens_waits_for_them() -> None:
    at_once = {
        (name, old, correction)
        for name in LOSSES
        for old in ("learner", "sampler")
        for correction in CORRECTIONS
        if splits_by_token(config(name, old, correction))
    }
    waiting = {correction for correction in CORRECTIONS if ("grpo", "learner", correction) not in at_once}
    assert waiting == {"sequence", "token, whole samples left out"}
    assert {name for name in LOSSES if (name, "sampler", "none") not in at_once} == {"gspo"}
    assert len(at_once) == 6 * 2 * 3 - 3
