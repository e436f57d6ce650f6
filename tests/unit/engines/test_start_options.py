"""What an engine on a GPU is started with besides what the configuration says."""

from itertools import pairwise

import pytest

from syncline.config import resolve
from syncline.engines.vllm.arguments import Start, _options


@pytest.mark.parametrize(
    ("device", "extra", "backends"),
    [("cuda", {}, ["mp"]), ("cuda", {"distributed_executor_backend": "ray"}, ["ray"]), ("cpu", {}, [])],
)
def test_a_gpus_worker_has_its_own_process_unless_the_configuration_says_otherwise(device, extra, backends) -> None:
    values = {
        "run": {"dir": "x", "num_steps": 1, "groups_per_step": 1},
        "model": {"path": "m", "max_length": 64},
        "sampling": {"max_tokens": 8},
        "environments": [{"task": "arithmetic"}],
        "engine": {"extra": extra},
        "bridge": {"name": "restart"},
    }
    words = _options(resolve(values), device, Start(port=1))
    found = [after for word, after in pairwise(words) if word == "--distributed-executor-backend"]
    assert found == backends
