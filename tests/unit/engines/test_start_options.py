"""What an engine on a GPU is started with besides what the configuration says."""

from itertools import pairwise

import pytest

from syncline.config import resolve
from syncline.engines.vllm.arguments import Start, _options


@pytest.mark.parametrize(
    ("device", "ranks", "extra", "backends"),
    [
        ("cuda", 1, {}, ["mp"]),
        ("cuda", 1, {"distributed_executor_backend": "ray"}, ["ray"]),
        ("cuda", 2, {}, []),
        ("cpu", 1, {}, []),
    ],
)
def test_a_gpus_worker_has_its_own_process_unless_the_configuration_says_otherwise(
    device: str, ranks: int, extra: dict, backends: list[str]
) -> None:
    """Of several ranks vLLM chooses itself: processes, or Ray over hosts."""
    values = {
        "run": {"dir": "x", "num_steps": 1, "groups_per_step": 1},
        "model": {"path": "m", "max_length": 64},
        "sampling": {"max_tokens": 8},
        "environments": [{"task": "arithmetic"}],
        "engine": {"extra": extra, "tensor_parallel_size": ranks, "devices": list(range(ranks))},
        "bridge": {"name": "restart"},
    }
    words = _options(resolve(values), device, Start(port=1))
    found = [after for word, after in pairwise(words) if word == "--distributed-executor-backend"]
    assert found == backends
