"""What an engine is told of a GPU's memory."""

import json
from typing import Any

import pytest

from syncline.config import resolve
from syncline.engines.vllm import compat
from syncline.engines.vllm.arguments import Start, _options
from syncline.errors import ConfigError

GPU_BYTES = 1000 << 20
OWNER = "http://127.0.0.1:8001"


def options(
    monkeypatch: pytest.MonkeyPatch, bridge: str, *, attach_to: str | None = None, **engine: Any
) -> dict[str, str]:
    monkeypatch.setattr(compat, "gpu_bytes", lambda: GPU_BYTES)
    values = {
        "run": {"dir": "x", "num_steps": 1, "groups_per_step": 1},
        "model": {"path": "m", "max_length": 64},
        "sampling": {"max_tokens": 8},
        "environments": [{"task": "arithmetic"}],
        "engine": {"gpu_memory_utilization": 0.2, **engine},
        "bridge": {"name": bridge},
    }
    words = _options(resolve(values), "cuda", Start(port=1, attach_to=attach_to))
    return {word.removeprefix("--"): value for word, value in zip(words, [*words[1:], ""], strict=True)}


def test_engines_that_start_at_once_on_one_gpu_are_told_their_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    found = options(monkeypatch, "restart", num_replicas=4)
    assert found["gpu-memory-utilization"] == "0.2"
    assert int(found["kv-cache-memory-bytes"]) == 100 << 20, "half of a fifth"
    own = options(monkeypatch, "restart", num_replicas=4, extra={"kv_cache_memory_bytes": 7})
    assert own["kv-cache-memory-bytes"] == "7"


@pytest.mark.parametrize("attach_to", [None, OWNER])
def test_engines_of_one_copy_start_at_once_and_are_told_too(
    monkeypatch: pytest.MonkeyPatch, attach_to: str | None
) -> None:
    found = options(monkeypatch, "shared", num_replicas=2, attach_to=attach_to)
    assert int(found["kv-cache-memory-bytes"]) == 100 << 20


def test_an_engine_that_attaches_is_not_to_be_measured_by_one_that_takes_itself_for_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(ConfigError, match=r"engine\.num_replicas: 1, and --attach-to starts another"):
        options(monkeypatch, "shared", attach_to=OWNER)
    told = options(monkeypatch, "shared", attach_to=OWNER, extra={"kv_cache_memory_bytes": 7})
    assert told["kv-cache-memory-bytes"] == "7"


def test_the_owner_tells_where_its_weights_lie_and_the_others_ask_it(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = {"enable_multithread_load": True}
    extra = {"model_loader_extra_config": threads}
    owner = options(monkeypatch, "shared", num_replicas=2, extra=extra)
    assert owner["load-format"] == "syncline_witnessed"
    assert json.loads(owner["model-loader-extra-config"]) == {**threads, "one_copy": {"port": 1}}
    other = options(monkeypatch, "shared", num_replicas=2, start_timeout_seconds=90, attach_to=OWNER)
    assert other["load-format"] == "syncline_attached"
    asked = {"url": OWNER, "timeout_seconds": 90}
    assert json.loads(other["model-loader-extra-config"]) == {"one_copy": asked}
    assert "load-format" not in options(monkeypatch, "restart"), "vLLM's own loader, where nobody attaches"


@pytest.mark.parametrize(
    ("bridge", "engine"),
    [("restart", {}), ("restart", {"num_replicas": 2, "devices": [0, 1]}), ("shared", {})],
)
def test_one_that_starts_alone_on_its_gpu_measures(
    monkeypatch: pytest.MonkeyPatch, bridge: str, engine: dict[str, Any]
) -> None:
    assert "kv-cache-memory-bytes" not in options(monkeypatch, bridge, **engine)
