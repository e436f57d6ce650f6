"""A torchrun start of another number of ranks than the configuration's is refused before anything is loaded."""

import pytest

from syncline.config.schema import Learner
from syncline.errors import ConfigError
from syncline.learner.distributed import num_ranks, refuse_other_number


@pytest.mark.parametrize("field", ["data_parallel_size", "tensor_parallel_size"])
def test_another_number_is_refused_by_the_field_that_has_it(monkeypatch: pytest.MonkeyPatch, field: str) -> None:
    learner = Learner.model_validate({field: 4})
    assert num_ranks(learner) == 4
    monkeypatch.setenv("WORLD_SIZE", "4")
    refuse_other_number(learner)
    monkeypatch.setenv("WORLD_SIZE", "2")
    expected = rf"learner\.{field}: 4, but torchrun started 2 ranks; set it to 2, or start 4 ranks"
    with pytest.raises(ConfigError, match=expected):
        refuse_other_number(learner)


def test_one_process_needs_no_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    refuse_other_number(Learner())
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"learner\.data_parallel_size: 1, but torchrun started 2 ranks"):
        refuse_other_number(Learner())
