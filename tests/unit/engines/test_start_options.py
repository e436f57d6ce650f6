"""What an engine on a GPU is started with besides what the configuration says."""

import os
from itertools import pairwise
from typing import Any

import pytest

from syncline.config import resolve
from syncline.engines.vllm.arguments import Start, _options, set_environment


def values(**sections: Any) -> dict[str, Any]:
    return {
        "run": {"dir": "x", "num_steps": 1, "groups_per_step": 1},
        "model": {"path": "m", "max_length": 64},
        "sampling": {"max_tokens": 8},
        "environments": [{"task": "arithmetic"}],
    } | sections


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
    engine = {"extra": extra, "tensor_parallel_size": ranks, "devices": list(range(ranks))}
    words = _options(resolve(values(engine=engine, bridge={"name": "restart"})), device, Start(port=1))
    found = [after for word, after in pairwise(words) if word == "--distributed-executor-backend"]
    assert found == backends


@pytest.mark.parametrize("name", ["PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"])
@pytest.mark.parametrize(("bridge", "device"), [("shared", "cuda"), ("restart", "cuda"), ("shared", "cpu")])
def test_memory_that_is_handed_out_does_not_lie_in_expandable_segments(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str, bridge: str, device: str
) -> None:
    monkeypatch.setattr(os, "environ", {name: "max_split_size_mb:64,expandable_segments:True"})
    set_environment(resolve(values(bridge={"name": bridge})), device)
    changed = (bridge, device) == ("shared", "cuda")
    assert os.environ[name] == ("max_split_size_mb:64" if changed else "max_split_size_mb:64,expandable_segments:True")
    assert (f"{name}: expandable_segments is left out in the engine" in caplog.text) is changed
