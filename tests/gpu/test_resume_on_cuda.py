"""A resumed run repeats bit for bit on GPUs too, with the attention kernels that a user has there.

In sequences that several blocks of an attention kernel share, whose sums no fixed order would have by itself.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rank_processes import on_ranks
from real_engine import make_tiny_model
from resumed_learner import Kind, held_in, recorded_group, whole_and_resumed

from syncline.bridges.ranks import DATA_PARALLEL, Ranks
from syncline.config.schema import Learner, Model, Optimizer
from syncline.learner.checkpoint import Checkpoints, TrainState
from syncline.learner.distributed import rank_device
from syncline.learner.model import Scorer, load_model, trainable_parameters
from syncline.learner.optim import SplitMasterAdamW, accumulate_fp32
from syncline.learner.packing import pack_samples

pytestmark = pytest.mark.timeout(600)
TRAINED = Kind(device="cuda", max_length=512, growth=50)
DROPOUT = {"lora": {"rank": 4, "dropout": 0.2}}
KINDS = {
    "one process": TRAINED,
    "one process, dropout": replace(TRAINED, model=DROPOUT),
    "two ranks": replace(TRAINED, learner={"data_parallel_size": 2}),
    "two ranks, dropout": replace(TRAINED, model=DROPOUT, learner={"data_parallel_size": 2, "loss": {"kl_coef": 0.05}}),
}


def needs(num_gpus: int) -> None:
    if torch.cuda.device_count() < num_gpus:
        pytest.skip(f"needs {num_gpus} GPUs")


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_learner_goes_on_to_the_bit(tmp_path: Path, kind: str) -> None:
    needs(KINDS[kind].num_ranks)
    whole, resumed = whole_and_resumed(KINDS[kind], make_tiny_model(tmp_path / "model", hidden_size=256), tmp_path)
    assert resumed.steps == whole.steps
    assert resumed == whole


def saved_by(ranks: Ranks, path: str, saved: str | None, folder: str) -> None:
    """Takes two steps, or resumes what was saved, and saves that in `folder`."""
    device = rank_device(torch.device(TRAINED.device))
    model = load_model(Model(path=path), device=device, running=Learner(), ranks=ranks)
    accumulate_fp32(model)
    optimizer = SplitMasterAdamW(trainable_parameters(model), Optimizer(), ranks=ranks)
    checkpoints, state, digest = Checkpoints(Path(folder), 1, Path(path), ranks), TrainState(2, 2, 100), "d"
    if saved:
        state, digest = checkpoints.load(Path(saved), model, optimizer)
    else:
        for index in (8, 9):
            samples = [sample for rollout in recorded_group(TRAINED, index).rollouts for sample in rollout.samples]
            for batch in pack_samples(samples, token_budget=2048):
                Scorer(1.0, 256).score(model, batch.to(device))[0].sum().backward()
            optimizer.step(1e-3)
    checkpoints.save(state, model, optimizer, digest=digest)


def test_another_number_of_ranks_has_every_bit_that_was_saved(tmp_path: Path) -> None:
    """A single one of what two saved: the same weights, and the pieces that two then make of its optimizer are those
    they had."""
    needs(2)
    path, saved, held = str(make_tiny_model(tmp_path / "model", hidden_size=256)), None, []
    for world_size in (2, 1, 2):
        folder = tmp_path / str(len(held))
        args = (path, saved, str(folder))
        on_ranks(saved_by, *args, world_size=world_size, device=TRAINED.device, dimension=DATA_PARALLEL)
        saved = str(folder / "step-000002")
        held.append({name: bits for name, bits in held_in(Path(saved)).items() if not name.startswith("rng")})
    by_two, by_one, by_two_again = held
    assert {name: by_one[name] for name in by_two if name.startswith(("model", "state"))}.items() <= by_two.items()
    assert by_two_again == by_two
