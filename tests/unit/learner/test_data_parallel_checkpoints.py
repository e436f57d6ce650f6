"""Checkpoints written from parts: to the bit for as many ranks, resharded for any other number, with every choice that
has state."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from rank_processes import on_ranks
from real_engine import make_tiny_model
from test_moments import linear_codes
from test_tensor_parallel import scored
from transformers import AutoModelForCausalLM

from syncline.bridges.ranks import DATA_PARALLEL, ONE_RANK, Ranks
from syncline.config.schema import Learner, Lora, Model, Optimizer
from syncline.errors import CheckpointError
from syncline.learner import moments
from syncline.learner.checkpoint import Checkpoints, TrainState
from syncline.learner.model import load_model, trainable_parameters
from syncline.learner.optim import SplitMasterAdamW, accumulate_fp32
from syncline.learner.places import gathered

STEP = "step-000002"
SAVED_BY = (1, 2)


@dataclass(frozen=True)
class Kept:
    """What is trained, in what type, with what moments."""

    dtype: str = "float32"
    moments: str = "float32"
    lora: Lora | None = None


KINDS = {
    "float32": Kept(),
    "bfloat16, split masters": Kept(dtype="bfloat16"),
    "8-bit moments": Kept(dtype="bfloat16", moments="int8"),
    "an adapter": Kept(lora=Lora(rank=4, dropout=0.1)),
}


class Run:
    """Every rank scores the same tokens, so that its gradient is the whole one times the number of ranks."""

    def __init__(self, ranks: Ranks, path: str, kept: Kept, *, resume: Path | None = None) -> None:
        self.ranks = ranks
        torch.manual_seed(3)
        config = Model(path=path, dtype=kept.dtype, lora=kept.lora)  # pyright: ignore[reportArgumentType]
        self.model = load_model(config, device=torch.device("cpu"), running=Learner(), ranks=ranks)
        accumulate_fp32(self.model)
        # a large epsilon: an element whose gradient is but rounding must not move by the whole rate
        settings = Optimizer(learning_rate=1e-2, eps=1e-2, max_grad_norm=0.5, moments=kept.moments)  # pyright: ignore
        self.optimizer = SplitMasterAdamW(trainable_parameters(self.model), settings, ranks=ranks)
        self.assets = Path(path)
        torch.manual_seed(ranks.rank)
        if resume:
            Checkpoints(resume.parent, 2, self.assets, ranks).load(resume, self.model, self.optimizer)

    def save(self, folder: Path) -> None:
        Checkpoints(folder, 2, self.assets, self.ranks).save(TrainState(2, 2), self.model, self.optimizer, digest="")

    def steps(self, count: int) -> "Run":
        for _ in range(count):
            scored(self.model)
            self.optimizer.step(1e-2)
        return self

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: gathered(p).detach().clone() for name, p in trainable_parameters(self.model)}


def of_kind(ranks: Ranks, path: str, folder: Path, kept: Kept) -> dict[str, Any]:
    """Saves after two steps and goes on for two; resumes what any number of ranks saved, and takes the two as well."""
    found: dict[str, Any] = {}
    if ranks.world_size in SAVED_BY:
        run = Run(ranks, path, kept).steps(2)
        run.save(folder / f"of-{ranks.world_size}")
        found["saved"], found["uninterrupted"] = run.weights(), run.steps(2).weights()
    for number in SAVED_BY:
        saved = folder / f"of-{number}" / STEP
        if saved.exists():
            run = Run(ranks, path, kept, resume=saved)
            found[f"restored from {number}"] = run.weights()
            found[f"resumed from {number}"] = run.steps(2).weights()
    return found


def every_kind(ranks: Ranks, path: str, folder: str) -> dict[str, dict[str, Any]]:
    with patch.object(moments, "_quantizer", lambda: moments._Quantizer(linear_codes())):
        return {name: of_kind(ranks, path, Path(folder) / name, kept) for name, kept in KINDS.items()}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return str(make_tiny_model(tmp_path_factory.mktemp("model"))), str(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="module")
def alone(places: tuple[str, str]) -> dict[str, Any]:
    return every_kind(ONE_RANK, *places)


@pytest.fixture(scope="module")
def two(places: tuple[str, str], alone: Any) -> list[dict[str, Any]]:
    return on_ranks(every_kind, *places, dimension=DATA_PARALLEL)


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name, tensor in found.items() if not torch.equal(tensor, expected[name])] == []


@pytest.mark.parametrize("kind", KINDS)
def test_as_many_ranks_go_on_to_the_bit(two: Any, kind: str) -> None:
    for rank in two:
        assert_equal(rank[kind]["resumed from 2"], two[0][kind]["uninterrupted"])


@pytest.mark.parametrize("kind", KINDS)
def test_another_number_of_ranks_has_every_bit_that_was_saved(alone: Any, two: Any, kind: str) -> None:
    for rank in two:
        assert_equal(rank[kind]["restored from 1"], alone[kind]["saved"])


def test_two_ranks_take_the_steps_that_one_takes(alone: Any, two: Any) -> None:
    for name, weight in two[0]["float32"]["resumed from 1"].items():
        expected = alone["float32"]["uninterrupted"][name]
        torch.testing.assert_close(weight, expected, rtol=1e-3, atol=1e-3, msg=name)


def test_one_process_resumes_what_two_ranks_saved(places: tuple[str, str], two: Any) -> None:
    path, folder = places
    saved = Path(folder) / "bfloat16, split masters" / "of-2" / STEP
    run = Run(ONE_RANK, path, KINDS["bfloat16, split masters"], resume=saved)
    assert_equal(run.weights(), two[0]["bfloat16, split masters"]["saved"])
    assert {file.name for file in saved.glob("optimizer*")} == {
        f"optimizer-0000{rank}-of-00002.safetensors" for rank in (0, 1)
    }
    loaded = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.bfloat16)
    assert_equal(dict(loaded.named_parameters()), two[0]["bfloat16, split masters"]["saved"])


def test_a_file_of_a_rank_that_is_gone_is_named(places: tuple[str, str], two: Any, tmp_path: Path) -> None:
    path, folder = places
    saved = Path(folder) / "float32" / "of-2" / STEP
    lost = saved / "optimizer-00001-of-00002.safetensors"
    kept = lost.rename(tmp_path / lost.name)
    try:
        with pytest.raises(CheckpointError, match=r"is not there in full .* a rank's optimizer file is gone"):
            Run(ONE_RANK, path, KINDS["float32"], resume=saved)
    finally:
        kept.rename(lost)


@pytest.mark.slow
def test_four_ranks_resume_what_two_saved(places: tuple[str, str], two: Any) -> None:
    for rank in on_ranks(every_kind, *places, world_size=4, dimension=DATA_PARALLEL):
        for kind in KINDS:
            assert_equal(rank[kind]["restored from 2"], two[0][kind]["saved"])
        for name, weight in rank["float32"]["resumed from 2"].items():
            expected = two[0]["float32"]["uninterrupted"][name]
            torch.testing.assert_close(weight, expected, rtol=1e-3, atol=1e-3, msg=name)
