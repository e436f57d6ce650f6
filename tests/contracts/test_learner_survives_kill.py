"""`kill -9` of a real learner in the middle of a step, and of one of its ranks: resumed, it takes the same steps."""

from pathlib import Path

import pytest
from real_engine import make_tiny_model
from resumed_learner import Kind, whole_and_resumed

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
DROPOUT = {"lora": {"rank": 4, "dropout": 0.2}}
KINDS = {
    "one process, dropout": Kind(DROPOUT),
    "two ranks": Kind({"dtype": "bfloat16"}, {"data_parallel_size": 2}),
    "two ranks, dropout": Kind(DROPOUT, {"data_parallel_size": 2, "loss": {"name": "bnpo", "kl_coef": 0.05}}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_learner_goes_on_to_the_bit(tmp_path: Path, kind: str) -> None:
    whole, resumed = whole_and_resumed(KINDS[kind], make_tiny_model(tmp_path / "model"), tmp_path)
    assert resumed == whole
