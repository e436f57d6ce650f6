"""Ranks that split the data have the gradient, the metrics and the weights of one process, for every loss."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from rank_processes import on_ranks
from test_microbatch_gradients import LOSSES, VOCABULARY, groups, relative_error, sample
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from syncline.bridges.ranks import DATA_PARALLEL, ONE_RANK, Ranks
from syncline.config.schema import Learner, Lora, Loss, Model, Optimizer, Recomputation
from syncline.learner.advantages import group_advantages
from syncline.learner.model import (
    Reference,
    Scorer,
    checkpoint_parameters,
    checkpoint_wholes,
    load_model,
    trainable_parameters,
)
from syncline.learner.optim import SplitMasterAdamW, accumulate_fp32
from syncline.learner.packing import pack
from syncline.learner.places import gathered
from syncline.learner.step import Step
from syncline.observe.metrics import Metrics
from syncline.types import Rollout, RolloutGroup, RolloutStatus

CPU = torch.device("cpu")
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}
MODELS = {
    "tied": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "untied": LlamaConfig(**SIZES | {"hidden_size": 18, "head_dim": 10}, tie_word_embeddings=False),
}


def one_sample() -> tuple[RolloutGroup, ...]:
    """So that all ranks but the first have nothing to compute."""
    made = sample(torch.Generator().manual_seed(1), 4, 6)
    right, wrong = (
        Rollout((made,), reward, RolloutStatus.COMPLETED, weight=weight) for reward, weight in ((1.0, 1.0), (0.0, 0.0))
    )
    return (RolloutGroup("one", "task", 0, (right, wrong)),)


@dataclass(frozen=True)
class Case:
    loss: Loss
    model: str = "tied"
    lora: Lora | None = None
    budget: int = 17
    one_sample: bool = False
    recompute: bool = False
    compile: str = "off"


def loss(name: str = "grpo", kl_coef: float = 0.0) -> Loss:
    return Loss.model_validate(
        {"name": name, "importance": {"clip_min": 0.5, "clip_max": 1.5}, "kl_coef": kl_coef, "mask_truncated": True}
    )


HEAD_TOO = Lora(rank=4, target_modules=("q_proj", "down_proj", "lm_head"))
CASES = {
    **{name: Case(loss(name)) for name in LOSSES},
    "bnpo in one micro-batch a rank": Case(loss("bnpo"), budget=1000),
    "layers recomputed, untied, parts unequal": Case(loss("dapo"), model="untied", recompute=True),
    "a reference model": Case(loss("grpo", 0.1)),
    "lora, its base the reference, the head adapted": Case(loss("grpo", 0.1), model="untied", lora=HEAD_TOO),
    "dora": Case(loss("dapo"), lora=Lora(rank=4, dora=True)),
    "nothing for the other ranks": Case(loss("bnpo"), one_sample=True),
}
OPTIMIZER = Optimizer(learning_rate=1e-2, eps=1e-3, weight_decay=0.1, max_grad_norm=0.5)


@dataclass
class Outcome:
    gradients: dict[str, torch.Tensor]
    metrics: list[dict[str, float]]
    weights: dict[str, torch.Tensor]
    """Under their checkpoint names, adapters merged, after two steps."""
    trained: dict[str, torch.Tensor]
    in_parts: bool


def outcome(ranks: Ranks, folder: str, case: Case, dtype: str = "float32") -> Outcome:
    running = Learner(
        token_budget=case.budget,
        loss=case.loss,
        optimizer=OPTIMIZER,
        logprob_chunk_tokens=8,
        recomputation=Recomputation(what="full" if case.recompute else "none"),
        compile=case.compile,  # pyright: ignore[reportArgumentType]
    )
    torch.manual_seed(0)
    config = Model(path=f"{folder}/{case.model}", dtype=dtype, lora=case.lora)  # pyright: ignore[reportArgumentType]
    model = load_model(config, device=CPU, running=running, ranks=ranks)
    awaken(model)
    accumulate_fp32(model)
    reference = Reference.of(model, config, running=running, device=CPU, ranks=ranks) if case.loss.kl_coef else None
    step = Step(running, Scorer(0.9, 8), reference, CPU, 16, 10, ranks)
    optimizer = SplitMasterAdamW(trainable_parameters(model), OPTIMIZER, ranks=ranks)
    batch = one_sample() if case.one_sample else groups()
    advantages = group_advantages(batch, "group")
    scoring = pack(groups(), advantages_of(groups()), **PACKING)[0]
    step.scorer.score_without_grad(model, scoring)  # as the parity gate does before the first step
    gradients, metrics = {}, []
    for number in range(2):
        report = Metrics()
        step.backward(model, batch, advantages, report, optimizer=optimizer, step=number)
        gradients = gradients or {name: gradient_of(p) for name, p in trainable_parameters(model)}
        step.apply_gradients(optimizer, number, report)
        metrics.append(report.reduced())
    step.scorer.score_without_grad(model, scoring)
    in_parts = all(hasattr(p, "full_tensor") for p in model.parameters()) or ranks.world_size == 1
    weights = {name: whole.clone() for name, whole in checkpoint_wholes(model, ranks)}
    assert list(weights) == [name for name, _ in checkpoint_parameters(model)]
    trained = {name: gathered(p).detach().clone() for name, p in trainable_parameters(model)}
    return Outcome(gradients, metrics, weights, trained, in_parts)


PACKING: dict[str, Any] = {"loss": loss(), "token_budget": 1000, "max_completion_tokens": 16}


def advantages_of(made: Any) -> dict[str, tuple[float, ...]]:
    return group_advantages(made, "group")


@torch.no_grad()
def awaken(model: Any) -> None:
    """PEFT starts with B = 0, for which A has no gradient. The same numbers on every rank's part."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            local = getattr(parameter, "_local_tensor", parameter)
            local.fill_(0.05)


def gradient_of(parameter: Any) -> torch.Tensor:
    main_grad = getattr(parameter, "main_grad", None)
    return gathered(parameter.grad if main_grad is None else main_grad).clone()


def all_cases(ranks: Ranks, folder: str) -> dict[str, Outcome]:
    return {name: outcome(ranks, folder, case) for name, case in CASES.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models")
    for name, config in MODELS.items():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            parameter.data.copy_(torch.randn_like(parameter) * 0.1 + (parameter.dim() == 1))
        model.save_pretrained(folder / name)
    return str(folder)


@pytest.fixture(scope="module")
def alone(folder: str) -> dict[str, Outcome]:
    return all_cases(ONE_RANK, folder)


@pytest.fixture(scope="module")
def split(folder: str) -> list[dict[str, Outcome]]:
    return on_ranks(all_cases, folder, world_size=3, dimension=DATA_PARALLEL)


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_one_process(alone: Any, split: Any, case: str) -> None:
    expected = alone[case].gradients
    assert expected
    for rank in split:
        found = rank[case].gradients
        assert found.keys() == expected.keys()
        whole = torch.cat([found[name].flatten() for name in expected])
        assert relative_error(whole, torch.cat([g.flatten() for g in expected.values()])) < 1e-6


@pytest.mark.parametrize("case", CASES)
def test_metrics_and_weights_are_those_of_one_process(alone: Any, split: Any, case: str) -> None:
    for rank in split:
        for found, expected in zip(rank[case].metrics, alone[case].metrics, strict=True):
            found, expected = dict(found), dict(expected)
            assert found.pop("time/optimizer_seconds") > 0 < expected.pop("time/optimizer_seconds")
            assert found.pop("step/num_microbatches") <= expected.pop("step/num_microbatches")
            assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)
            assert found["tokens/trained"] == expected["tokens/trained"] > 0
        assert rank[case].weights.keys() == alone[case].weights.keys()
        for name, weight in rank[case].weights.items():
            torch.testing.assert_close(weight, alone[case].weights[name], rtol=1e-4, atol=1e-6, msg=name)


def test_scoring_leaves_nothing_gathered(split: Any) -> None:
    assert all(outcome.in_parts for rank in split for outcome in rank.values())


@pytest.mark.slow
def test_compiled_layers_have_the_same_gradients(folder: str) -> None:
    case = Case(loss("bnpo"), compile="on", recompute=True)
    expected = outcome(ONE_RANK, folder, case).gradients
    for found in on_ranks(outcome, folder, case, dimension=DATA_PARALLEL):
        for name, gradient in found.gradients.items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6, msg=name)
