"""What an engine is told of a GPU's memory."""

from typing import Any

import pytest

from syncline.config import resolve
from syncline.engines.vllm import compat
from syncline.engines.vllm.arguments import Start, _options

GPU_BYTES = 1000 << 20


def options(monkeypatch: pytest.MonkeyPatch, bridge: str, **engine: Any) -> dict[str, str]:
    monkeypatch.setattr(compat, "gpu_bytes", lambda: GPU_BYTES)
    values = {
        "run": {"dir": "x", "num_steps": 1, "groups_per_step": 1},
        "model": {"path": "m", "max_length": 64},
        "sampling": {"max_tokens": 8},
        "environments": [{"task": "arithmetic"}],
        "engine": {"gpu_memory_utilization": 0.2, **engine},
        "bridge": {"name": bridge},
    }
    words = _options(resolve(values), "cuda", Start(port=1))
    return {word.removeprefix("--"): value for word, value in zip(words, [*words[1:], ""], strict=True)}


def test_engines_that_start_at_once_on_one_gpu_are_told_their_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    found = options(monkeypatch, "restart", num_replicas=4)
    assert found["gpu-memory-utilization"] == "0.2"
    assert int(found["kv-cache-memory-bytes"]) == 100 << 20, "half of a fifth"
    own = options(monkeypatch, "restart", num_replicas=4, extra={"kv_cache_memory_bytes": 7})
    assert own["kv-cache-memory-bytes"] == "7"


@pytest.mark.parametrize(
    ("bridge", "engine"),
    [("restart", {}), ("restart", {"num_replicas": 2, "devices": [0, 1]}), ("shared", {"num_replicas": 2})],
)
def test_one_that_starts_alone_on_its_gpu_measures(
    monkeypatch: pytest.MonkeyPatch, bridge: str, engine: dict[str, Any]
) -> None:
    assert "kv-cache-memory-bytes" not in options(monkeypatch, bridge, **engine)
