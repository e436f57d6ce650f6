"""Adapters of others: one that does not say what it is, or does not fit, is told, and none is loaded in part."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from real_engine import make_tiny_model
from safetensors.torch import load_file, save_file

from syncline.config.schema import Lora, Model
from syncline.errors import ConfigError
from syncline.learner.model import load_model
from syncline.offline.adapters import adapted
from syncline.offline.dpo import load_policy
from syncline.offline.merge import merge

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("adapters") / "base")


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    model: Any = load_model(Model(path=str(base), lora=Lora(rank=4)), device=CPU)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def settings(adapter: Path, **change: Any) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


def without(adapter: Path, name: str) -> None:
    """One tensor fewer, or under a name that the model does not have."""
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    [found] = [key for key in tensors if key.endswith(name)]
    tensors[found.replace("layers.1", "layers.9")] = tensors.pop(found)
    save_file(tensors, path)


BROKEN: dict[str, Callable[[Path], object]] = {
    "a list": lambda adapter: (adapter / "adapter_config.json").write_text("[]"),
    "no JSON": lambda adapter: (adapter / "adapter_config.json").write_text(""),
    "a rank that is a text": lambda adapter: settings(adapter, r="4"),
    "another rank": lambda adapter: settings(adapter, r=8),
    "rank 0": lambda adapter: settings(adapter, r=0),
    "a kind nobody knows": lambda adapter: settings(adapter, peft_type="XX"),
    "layers that are not there": lambda adapter: settings(adapter, target_modules=["nope"]),
    "torn weights": lambda adapter: (adapter / "adapter_model.safetensors").write_bytes(b"abc"),
}
LOADERS: dict[str, Callable[[Path, Path], object]] = {
    "merge": lambda base, adapter: merge(str(base), adapter, adapter.parent / "out"),
    "dpo": lambda base, adapter: load_policy(Model(path=str(base), lora=Lora()), adapter, device=CPU),
    "publish": lambda base, adapter: adapted(load_model(Model(path=str(base)), device=CPU), adapter),
}


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("fault", BROKEN)
def test_what_is_broken_is_told_with_its_folder(fault: str, loader: str, base: Path, adapter: Path) -> None:
    BROKEN[fault](adapter)
    with pytest.raises(ConfigError, match=str(adapter)):
        LOADERS[loader](base, adapter)
    assert not (adapter.parent / "out").exists()


@pytest.mark.parametrize("loader", LOADERS)
def test_none_is_loaded_in_part(loader: str, base: Path, adapter: Path) -> None:
    """PEFT warns, and goes on with a layer as it was made: an adapter of a deeper model, say."""
    without(adapter, "layers.1.mlp.up_proj.lora_B.weight")
    with pytest.raises(ConfigError, match=r"layers\.9\.mlp\.up_proj"):
        LOADERS[loader](base, adapter)
