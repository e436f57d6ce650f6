"""The gradient of many micro-batches is the gradient of one, for every loss; a per-micro-batch mean would not be."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from syncline.config.schema import Loss
from syncline.learner.advantages import group_advantages
from syncline.learner.attention import ATTENTION, register_attention
from syncline.learner.importance import importance_weights
from syncline.learner.logprobs import token_logprobs
from syncline.learner.losses import ALGORITHMS, k3_kl, weighted_loss
from syncline.learner.packing import PackedBatch, pack
from syncline.types import Rollout, RolloutGroup, RolloutStatus, TrainingSample, VersionSpan

VOCABULARY = 32
LOSSES = ("grpo", "dr_grpo", "dapo", "bnpo", "gspo", "cispo")


@cache
def model() -> Any:
    register_attention()
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    return AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION)


def sample(generator: torch.Generator, prompt: int, sampled: int) -> TrainingSample:
    """Sampler logprobs scatter around uniform by 0.3: ratios on both sides of both clip bounds."""
    token_ids = torch.randint(VOCABULARY, (prompt + sampled,), generator=generator).tolist()
    logprobs = (0.3 * torch.randn(sampled, generator=generator) - math.log(VOCABULARY)).tolist()
    return TrainingSample(
        token_ids=tuple(token_ids),
        loss_mask=(False,) * prompt + (True,) * sampled,
        logprobs=(0.0,) * prompt + tuple(logprobs),
        versions=(VersionSpan(0, prompt, prompt + sampled),),
    )


@cache
def groups() -> tuple[RolloutGroup, ...]:
    """Uneven lengths, a rollout of two samples that weighs more, one cut off and one that failed."""
    generator = torch.Generator().manual_seed(0)
    lengths = [[(3, 9), (3, 1), (3, 4)], [(5, 12), (5, 2), (5, 6)], [(2, 7), (2, 7), (2, 3)]]
    built = []
    for g, shapes in enumerate(lengths):
        rollouts = [
            Rollout((sample(generator, *shape),), float(i * i - g * (i == 1)), RolloutStatus.COMPLETED)
            for i, shape in enumerate(shapes)
        ]
        built.append(RolloutGroup(f"group-{g}", "task", g, tuple(rollouts)))
    two = Rollout((sample(generator, 4, 3), sample(generator, 6, 8)), 2.0, RolloutStatus.COMPLETED, weight=2.5)
    cut = Rollout((sample(generator, 4, 10),), 0.0, RolloutStatus.TRUNCATED)
    failed = Rollout((sample(generator, 4, 5),), None, RolloutStatus.ERROR)
    return (*built, RolloutGroup("group-3", "task", 3, (two, cut, failed)))


def batches(loss: Loss, token_budget: int) -> Sequence[PackedBatch]:
    advantages = group_advantages(groups(), loss.scale_advantages)
    return pack(groups(), advantages, loss=loss, token_budget=token_budget, max_completion_tokens=16)


def backward(batch: PackedBatch, loss: Loss) -> None:
    policy = model()
    hidden = policy.model(
        input_ids=batch.token_ids[None],
        position_ids=batch.position_ids[None],
        use_cache=False,
        **batch.attention_kwargs(),
    ).last_hidden_state[0]
    logprobs, _ = token_logprobs(hidden[batch.predict_index], policy.lm_head, batch.labels, temperature=0.9, chunk=16)
    token_loss = ALGORITHMS[loss.name].token_loss(
        logprobs,
        batch.sampler_logprobs,
        advantages=batch.advantages,
        sample_index=batch.sample_index,
        clip_low=loss.clip_low,
        clip_high=loss.clip_high,
    )
    weights, _ = importance_weights(
        logprobs, batch.sampler_logprobs, sample_index=batch.sample_index, importance=loss.importance
    )
    kl = k3_kl(logprobs, batch.sampler_logprobs)
    weighted_loss(token_loss, batch.loss_weights, importance_weights=weights, kl=kl, kl_coef=loss.kl_coef).backward()


def gradient(microbatches: Sequence[PackedBatch], loss: Loss) -> torch.Tensor:
    model().zero_grad()
    for batch in microbatches:
        backward(batch, loss)
    return torch.cat([parameter.grad.flatten() for parameter in model().parameters()])


def relative_error(ours: torch.Tensor, expected: torch.Tensor) -> float:
    return ((ours - expected).norm() / expected.norm()).item()


def config(name: str, level: str, mode: str = "truncate") -> Loss:
    importance = {"level": level, "mode": mode, "clip_min": 0.5, "clip_max": 1.5}
    return Loss.model_validate({"name": name, "importance": importance, "kl_coef": 0.05, "mask_truncated": True})


@pytest.mark.parametrize("level", ["none", "token", "sequence", "geometric"])
@pytest.mark.parametrize("name", LOSSES)
def test_many_microbatches_have_the_gradient_of_one(name: str, level: str) -> None:
    loss = config(name, level, "mask" if level in ("sequence", "geometric") else "truncate")
    whole, split = batches(loss, 1000), batches(loss, 17)
    assert len(whole) == 1
    assert len(split) >= 5
    assert relative_error(gradient(split, loss), gradient(whole, loss)) < 1e-6


def microbatch_tokens(batch: PackedBatch, num_microbatches: int) -> torch.Tensor:
    """A mean over the tokens of the micro-batch, then over micro-batches."""
    return torch.full_like(batch.loss_weights, 1 / (batch.num_labels * num_microbatches))


def microbatch_share(batch: PackedBatch, num_microbatches: int) -> torch.Tensor:
    """The right proportions inside the micro-batch, then a mean over micro-batches."""
    return batch.loss_weights / (batch.loss_weights.sum() * num_microbatches)


@pytest.mark.parametrize("wrong", [microbatch_tokens, microbatch_share])
@pytest.mark.parametrize("name", LOSSES)
def test_a_mean_over_each_microbatch_would_not(name: str, wrong: Callable[[PackedBatch, int], torch.Tensor]) -> None:
    loss = config(name, "token")
    whole, split = gradient(batches(loss, 1000), loss), batches(loss, 17)
    means = [replace(batch, loss_weights=wrong(batch, len(split))) for batch in split]
    assert relative_error(gradient(means, loss), whole) > 0.05
