"""Whoever reads a model's config.json says what is wrong with it: the trainers, the merge, the tokenizer, the proof."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from real_engine import make_tiny_model

from syncline.bridges.verify import faults_of
from syncline.config.schema import Lora, Model
from syncline.envs.rendering import load_tokenizer
from syncline.errors import ConfigError
from syncline.learner.model import assets_folder, load_model
from syncline.offline.dpo import load_policy
from syncline.offline.merge import merge

CPU = torch.device("cpu")
READERS: dict[str, Callable[[Path], object]] = {
    "learner": lambda folder: load_model(Model(path=str(folder), max_length=64), device=CPU),
    "dpo": lambda folder: load_policy(Model(path=str(folder), max_length=64, lora=Lora()), None, device=CPU),
    "merge": lambda folder: merge(str(folder), folder, folder / "out", any_base_name=True),
    "tokenizer": lambda folder: load_tokenizer(str(folder)),
    "pipeline": lambda folder: assets_folder(str(folder)),
    "verify": lambda folder: faults_of(folder, {}),
}
CHANGES = {"a list": ("[1]", "holds a list"), "a text": ({"num_hidden_layers": "2"}, "'2' is no whole number")}
CONTRADICTION = {"num_hidden_layers": 5}
"""Of layers that `layer_types` does not name: transformers says so, in an error of a kind of its own."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = make_tiny_model(tmp_path / "model")
    (model / "adapter_config.json").write_text("{}")
    return model


def write(folder: Path, change: str | dict) -> None:
    settings = json.loads((folder / "config.json").read_text())
    text = change if isinstance(change, str) else json.dumps(settings | change)
    (folder / "config.json").write_text(text)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("reader", READERS)
def test_it_is_told_with_its_file(reader: str, change: str, folder: Path) -> None:
    text, told = CHANGES[change]
    write(folder, text)
    if reader == "verify":
        (folder / "adapter_config.json").unlink()
    with pytest.raises(ConfigError, match=f"{folder}/config.json.*{told}"):
        READERS[reader](folder)


@pytest.mark.parametrize("reader", ["learner", "dpo", "merge", "tokenizer"])
def test_what_transformers_alone_finds_is_told_too(reader: str, folder: Path) -> None:
    write(folder, CONTRADICTION)
    with pytest.raises(ConfigError, match=f"(?s){folder}.*`num_hidden_layers`"):
        READERS[reader](folder)


def test_a_model_that_was_never_fetched_is_told() -> None:
    with pytest.raises(ConfigError, match=r"model\.path: 'nobody/has-it' is no folder here, .*fetch the model"):
        assets_folder("nobody/has-it")
