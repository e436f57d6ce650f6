"""A resumed run repeats bit for bit on GPUs too, with the attention kernels and compiled layers that a user has there.

In sequences that several blocks of an attention kernel share, whose sums no fixed order would have by itself.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from real_engine import make_tiny_model
from resumed_learner import Kind, whole_and_resumed

pytestmark = pytest.mark.timeout(600)
TRAINED = Kind(device="cuda", max_length=512, growth=50)
DROPOUT = {"lora": {"rank": 4, "dropout": 0.2}}
KINDS = {
    "one process": TRAINED,
    "one process, dropout": replace(TRAINED, model=DROPOUT),
    "two ranks": replace(TRAINED, learner={"data_parallel_size": 2}),
    "two ranks, dropout": replace(TRAINED, model=DROPOUT, learner={"data_parallel_size": 2, "loss": {"kl_coef": 0.05}}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_learner_goes_on_to_the_bit(tmp_path: Path, kind: str) -> None:
    asked = KINDS[kind]
    if torch.cuda.device_count() < asked.num_ranks:
        pytest.skip(f"needs {asked.num_ranks} GPUs")
    whole, resumed = whole_and_resumed(asked, make_tiny_model(tmp_path / "model", hidden_size=256), tmp_path)
    assert resumed.steps == whole.steps
    assert resumed == whole
    kernels = [len(list(folder.rglob("*.py"))) for folder in tmp_path.glob("*/kernels-*")]
    assert len(kernels) == 3 and all(kernels), "the layers were not compiled"
