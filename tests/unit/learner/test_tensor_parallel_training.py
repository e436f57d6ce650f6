"""Steps of a split model are one rank's; its checkpoints resume on any number of ranks, and to the bit on as many."""

from pathlib import Path
from typing import Any

import pytest
import torch
from rank_processes import on_ranks
from test_tensor_parallel import FAMILIES, save, scored
from transformers import AutoModelForCausalLM

from syncline.bridges.ranks import ONE_RANK, Ranks
from syncline.config.schema import Learner, Model, Optimizer, Recomputation
from syncline.errors import TrainingError
from syncline.learner.checkpoint import Checkpoints, TrainState
from syncline.learner.model import load_model, trainable_parameters
from syncline.learner.optim import SplitMasterAdamW, accumulate_fp32
from syncline.learner.places import shard, wholes

RECOMPUTED = Learner(recomputation=Recomputation(what="full"))
FAMILY = "qwen3, key heads shared"
OPTIMIZER = Optimizer(learning_rate=1e-2, eps=1e-3, weight_decay=0.1, max_grad_norm=0.5)
"""A large epsilon: an element whose gradient is but rounding must not move by the whole rate."""


class Run:
    def __init__(self, ranks: Ranks, path: str, *, dtype: str, resume: Path | None = None) -> None:
        self.ranks = ranks
        recomputed = ranks.world_size > 1  # activations computed again in the backward pass must change nothing
        config = Model(path=path, dtype=dtype)  # pyright: ignore
        device = torch.device("cpu")
        self.model = load_model(config, device=device, running=RECOMPUTED if recomputed else Learner(), ranks=ranks)
        accumulate_fp32(self.model)
        self.optimizer = SplitMasterAdamW(trainable_parameters(self.model), OPTIMIZER, ranks=ranks)
        self.assets = Path(path)
        if resume:
            self.checkpoints(resume.parent).load(resume, self.model, self.optimizer)

    def checkpoints(self, folder: Path) -> Checkpoints:
        return Checkpoints(folder, 2, self.assets, self.ranks)

    def steps(self, count: int) -> list[float]:
        norms = []
        for _ in range(count):
            scored(self.model)
            norms.append(self.optimizer.step(OPTIMIZER.learning_rate))
        return norms

    def weights(self) -> dict[str, torch.Tensor]:
        shards = ((name, shard(p)) for name, p in self.model.named_parameters())
        return {name: whole.clone() for name, whole in wholes(shards, self.ranks)}


def interrupted(ranks: Ranks, path: str, folder: str, dtype: str) -> tuple[list[float], Any, Any, Any]:
    """Norms of four steps, and the weights after them, of the run itself and of one resumed in their middle; then of
    one that resumes where another number of ranks had trained."""
    whole = Run(ranks, path, dtype=dtype)
    norms = whole.steps(2)
    checkpoints = whole.checkpoints(Path(folder) / f"of-{ranks.world_size}")
    checkpoints.save(TrainState(2, 2), whole.model, whole.optimizer, digest="")
    norms += whole.steps(2)
    newest = checkpoints.newest()
    assert newest is not None
    resumed = Run(ranks, path, dtype=dtype, resume=newest)
    resumed.steps(2)
    others = Run(ranks, path, dtype=dtype, resume=Path(folder) / "of-1" / newest.name)
    others.steps(2)
    return norms, whole.weights(), resumed.weights(), others.weights()


def on_both(ranks: Ranks, path: str, folder: str) -> dict[str, Any]:
    return {dtype: interrupted(ranks, path, f"{folder}/{dtype}", dtype) for dtype in ("float32", "bfloat16")}


@pytest.fixture(scope="module")
def model_path(tmp_path_factory) -> str:
    return save(FAMILIES[FAMILY], tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def outcomes(model_path: str, tmp_path_factory) -> tuple[Path, dict[str, Any], list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("checkpoints")
    alone = on_both(ONE_RANK, model_path, str(folder))
    return folder, alone, on_ranks(on_both, model_path, str(folder))


def test_steps_and_norms_are_those_of_one_rank(outcomes) -> None:
    _, alone, split = outcomes
    norms, weights, _, _ = alone["float32"]
    for outcome in split:
        torch.testing.assert_close(outcome["float32"][0], norms, rtol=1e-5, atol=0)
        for name, weight in outcome["float32"][1].items():
            torch.testing.assert_close(weight, weights[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_resumed_run_takes_the_very_same_steps_on_every_rank(outcomes, dtype: str) -> None:
    _, _, split = outcomes
    expected = split[0][dtype][1]
    for outcome in split:
        _, whole, resumed, _ = outcome[dtype]
        assert all(torch.equal(whole[name], expected[name]) for name in expected)
        assert all(torch.equal(resumed[name], expected[name]) for name in expected)


def test_a_checkpoint_resumes_on_another_number_of_ranks(outcomes, model_path: str) -> None:
    folder, alone, split = outcomes
    alone_from_split = Run(ONE_RANK, model_path, dtype="float32", resume=folder / "float32" / "of-2" / "step-000002")
    alone_from_split.steps(2)
    for weights in (alone_from_split.weights(), split[0]["float32"][3]):
        for name, weight in weights.items():
            torch.testing.assert_close(weight, alone["float32"][1][name], rtol=1e-4, atol=1e-5, msg=name)


def test_a_checkpoint_of_two_ranks_is_an_ordinary_model(outcomes) -> None:
    folder, _, _ = outcomes
    one, two = (
        dict(AutoModelForCausalLM.from_pretrained(folder / "float32" / of / "step-000002").named_parameters())
        for of in ("of-1", "of-2")
    )
    for name, parameter in one.items():
        torch.testing.assert_close(two[name], parameter, rtol=1e-4, atol=1e-5, msg=name)


def poisoned(ranks: Ranks, path: str) -> str:
    """A gradient that is not finite on rank 1 alone."""
    run = Run(ranks, path, dtype="float32")
    scored(run.model)
    if ranks.rank == 1:
        run.model.get_submodule("model.layers.1.mlp.down_proj").weight.grad.to_local()[0, 0] = torch.inf  # pyright: ignore
    before = run.weights()
    with pytest.raises(TrainingError) as raised:
        run.optimizer.step(1e-2)
    assert all(torch.equal(before[name], weight) for name, weight in run.weights().items())
    return str(raised.value)


def test_a_gradient_that_is_not_finite_on_one_rank_is_named_on_all(model_path: str) -> None:
    first, second = on_ranks(poisoned, model_path)
    assert first == second
    assert "model.layers.1.mlp.down_proj.weight" in first
