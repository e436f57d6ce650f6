"""Merging: the folder says what adapter and base said together, for each kind of adapter, or there is no folder."""

import json
from pathlib import Path

import pytest
import torch
from real_engine import make_tiny_model
from safetensors.torch import load_file, save_file

from syncline.cli.merge import model_folder
from syncline.config.offline import OfflineConfig
from syncline.config.schema import Lora, Model
from syncline.errors import CheckpointError, ConfigError
from syncline.learner.model import load_model
from syncline.offline import merge as merging
from syncline.offline.merge import merge
from syncline.offline.stage import MANIFEST_FILE


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("merge") / "small-base", hidden_size=64)


def make_adapter(base: Path, folder: Path, **lora) -> Path:
    """A trained one's shape: B is not zero."""
    model = load_model(Model(path=str(base), lora=Lora(rank=4, **lora)), device=torch.device("cpu"))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.05)
        elif "magnitude" in name:
            parameter.data.mul_(1.2)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("kind", "lora"), [("LoRA", {}), ("rsLoRA", {"rslora": True, "alpha": 8.0}), ("DoRA", {"dora": True})]
)
def test_the_merged_folder_says_what_the_adapter_says(base: Path, tmp_path: Path, kind: str, lora: dict) -> None:
    found = merge(str(base), make_adapter(base, tmp_path / "adapter", **lora), tmp_path / "out", dtype="float32")
    assert (found.kind, found.num_adapted) == (kind, 14)
    assert found.mean_abs_diff < 1e-5 < 0.01 < found.adapter_effect
    assert json.loads((tmp_path / "out" / "merge.json").read_text())["digest"] == found.digest
    again = load_model(Model(path=str(tmp_path / "out"), dtype="float32"), device=torch.device("cpu"))
    assert merging.model_digest(merging.parameter_digests(again.named_parameters())) == found.digest


def test_an_adapter_of_another_base_is_refused_by_name(base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(base, tmp_path / "adapter")
    moved = make_tiny_model(tmp_path / "other-base", hidden_size=64)
    with pytest.raises(ConfigError, match=r"other-base' is not '.*small-base', which the adapter was trained on"):
        merge(str(moved), adapter, tmp_path / "out")
    merge(str(moved), adapter, tmp_path / "out", any_base_name=True)


def test_an_adapter_of_another_base_is_refused_by_shape(base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(base, tmp_path / "adapter")
    larger = make_tiny_model(tmp_path / "small-base", hidden_size=128)
    with pytest.raises(ConfigError, match=r"down_proj is \[128, 256\], and the adapter's lora_A\.weight is \[4, 128\]"):
        merge(str(larger), adapter, tmp_path / "out")
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file({k.replace("layers.1", "layers.9"): t for k, t in tensors.items()}, adapter / "adapter_model.safetensors")
    with pytest.raises(ConfigError, match=r"has no model\.layers\.9\..*, which the adapter adapts"):
        merge(str(base), adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_adapter_with_a_nan_is_not_merged(base: Path, tmp_path: Path) -> None:
    path = make_adapter(base, tmp_path / "adapter") / "adapter_model.safetensors"
    tensors = load_file(path)
    next(tensor for name, tensor in tensors.items() if "down_proj.lora_B" in name)[0, 0] = float("nan")
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=r"down_proj\.weight is not finite after the merge"):
        merge(str(base), tmp_path / "adapter", tmp_path / "out")


def test_weights_that_do_not_say_what_the_adapter_says_are_not_kept(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a merge would that forgot one layer."""
    plain = dict(load_model(Model(path=str(base)), device=torch.device("cpu")).named_parameters())
    name = "model.layers.0.mlp.down_proj.weight"
    saved = merging.saved_parameters
    monkeypatch.setattr(merging, "saved_parameters", lambda model: {**dict(saved(model)), name: plain[name]}.items())
    with pytest.raises(CheckpointError, match=r"differ from the adapter by .* above the tolerance 0\.0001"):
        merge(str(base), make_adapter(base, tmp_path / "adapter"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tolerance_of_zero_is_one(base: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"above the tolerance 0 \("):
        merge(str(base), make_adapter(base, tmp_path / "adapter", dora=True), tmp_path / "out", tolerance=0.0)


def test_a_merge_killed_after_its_folder_appeared_is_gone_on_with(base: Path, tmp_path: Path) -> None:
    """Its files are digested then, which takes minutes for a large model."""
    rows = {"name": "sums", "made": {}}
    values = {
        "run": {"dir": str(tmp_path / "run")},
        "model": {"path": str(base), "lora": {}},
        "merge": {"adapter": str(make_adapter(base, tmp_path / "adapter"))},
        "collect": {"questions": rows},
        "eval": {"sets": [rows]},
    }
    config = OfflineConfig.model_validate(values)
    folder = model_folder(config)
    manifest = folder.parent / MANIFEST_FILE
    done = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(done | {"state": "running", "outputs": {}, "facts": {}}))
    assert model_folder(config) == folder
    again = json.loads(manifest.read_text())
    assert {name: again[name] for name in ("state", "outputs", "facts")} == {
        name: done[name] for name in ("state", "outputs", "facts")
    }
