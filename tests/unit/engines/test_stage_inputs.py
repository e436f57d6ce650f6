"""A later stage of a pipeline has what it takes its inputs in, whether or not vLLM warmed up."""

from types import SimpleNamespace
from typing import Any

import pytest

vllm_distributed = pytest.importorskip("vllm.distributed")

from syncline.engines.vllm.compat import make_stage_inputs  # noqa: E402


class Runner:
    def __init__(self, held: str | None = None) -> None:
        self.intermediate_tensors = held
        self.max_num_tokens, self.device = 256, "cpu"
        self.model_config = SimpleNamespace(dtype="bfloat16")
        self.model = SimpleNamespace(make_empty_intermediate_tensors=lambda **asked: asked)


@pytest.mark.parametrize(
    ("is_first", "held", "expected"),
    [
        (False, None, {"batch_size": 256, "dtype": "bfloat16", "device": "cpu"}),
        (False, "of the warm-up", "of the warm-up"),
        (True, None, None),
    ],
)
def test_it_is_made_where_it_is_missing(
    monkeypatch: pytest.MonkeyPatch, is_first: bool, held: str | None, expected: Any
) -> None:
    monkeypatch.setattr(vllm_distributed, "get_pp_group", lambda: SimpleNamespace(is_first_rank=is_first))
    runner = Runner(held)
    make_stage_inputs(runner)
    assert runner.intermediate_tensors == expected
