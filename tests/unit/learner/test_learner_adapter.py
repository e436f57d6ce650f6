"""What the adapter's bridge sees of a PEFT model, and what of one it must refuse by name."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from real_engine import make_tiny_model
from transformers import AutoModelForCausalLM

from syncline.config.schema import Lora
from syncline.errors import SyncError
from syncline.learner.adapter import AdapterLayers, base_parameters
from syncline.learner.model import add_lora, checkpoint_parameters


@pytest.fixture(scope="module")
def model_path(tmp_path_factory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"))


def plain(model_path: Path):
    return AutoModelForCausalLM.from_pretrained(model_path)


def peft(model_path: Path, **options):
    return get_peft_model(plain(model_path), LoraConfig(**{"r": 2, "target_modules": ["q_proj", "up_proj"]} | options))


def test_the_base_has_the_checkpoints_names_and_the_tensors_that_are_trained_around(model_path: Path) -> None:
    model = add_lora(plain(model_path), Lora(rank=4))
    base = dict(base_parameters(model))
    loaded = dict(plain(model_path).named_parameters())
    assert list(base) == list(loaded)
    assert all(torch.equal(base[name], loaded[name]) for name in base)
    inside = model.get_base_model().get_submodule("model.layers.0.mlp.up_proj")  # type: ignore[operator]
    assert base["model.layers.0.mlp.up_proj.weight"] is inside.base_layer.weight


@pytest.mark.parametrize(("rslora", "scaling"), [(False, 2.0), (True, 4.0)])
def test_layers_have_the_checkpoints_names_and_their_own_scaling(
    model_path: Path, rslora: bool, scaling: float
) -> None:
    layers = dict(AdapterLayers()(add_lora(plain(model_path), Lora(rank=4, alpha=8, rslora=rslora))))
    assert len(layers) == 2 * 7
    assert layers["model.layers.1.self_attn.v_proj"].scaling == scaling
    assert layers["model.layers.1.mlp.down_proj"].a.shape == (4, 256)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"use_dora": True}, r"q_proj\.lora_magnitude_vector"),
        ({"bias": "all"}, r"q_proj\.base_layer\.bias"),
        ({"lora_bias": True, "target_modules": ["q_proj"]}, r"q_proj\.lora_B\.default\.bias"),
        ({"modules_to_save": ["norm"]}, r"norm\.modules_to_save\.default\.weight"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, r"embed_tokens\.lora_embedding_A"),
    ],
    ids=["dora", "bias", "lora_bias", "modules_to_save", "embedding"],
)
def test_what_vllm_would_drop_is_refused_by_name(model_path: Path, options: dict, named: str) -> None:
    with pytest.raises(SyncError, match=rf"(?s)LoRA pairs of linear layers alone.*restart.*{named}"):
        dict(AdapterLayers()(peft(model_path, **options)))


def test_layers_found_once_are_yielded_as_they_are_now(model_path: Path) -> None:
    model, layers = add_lora(plain(model_path), Lora(rank=4)), AdapterLayers()
    first, name = dict(layers(model)), "model.layers.0.mlp.up_proj"
    module = model.get_base_model().get_submodule(name)  # type: ignore[operator]
    module.lora_A["default"].weight = torch.nn.Parameter(torch.ones(4, 128))
    assert dict(layers(model))[name].a is module.lora_A["default"].weight
    assert dict(layers(model)).keys() == first.keys()


def test_another_model_or_another_adapter_is_looked_through_again(model_path: Path) -> None:
    model, layers = add_lora(plain(model_path), Lora(rank=4)), AdapterLayers()
    assert len(dict(layers(model))) == 2 * 7
    assert len(dict(layers(peft(model_path)))) == 2 * 2
    model.add_adapter("wide", LoraConfig(r=8, target_modules=["q_proj"]))  # type: ignore[operator]
    dict(layers(model))
    model.set_adapter("wide")  # type: ignore[operator]
    assert {name: tuple(layer.b.shape) for name, layer in layers(model)} == {
        f"model.layers.{i}.self_attn.q_proj": (128, 8) for i in range(2)
    }


def test_a_model_without_an_adapter_is_refused(model_path: Path) -> None:
    with pytest.raises(SyncError, match=r"the model has no LoRA layer|LoRA pairs of linear layers alone"):
        dict(AdapterLayers()(plain(model_path)))


def test_dora_is_merged_with_its_magnitudes(model_path: Path) -> None:
    """As PEFT merges it, bit for bit."""
    model = add_lora(plain(model_path), Lora(rank=2, dora=True))
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(torch.randn_like(parameter) * 0.1)
    merged = dict(checkpoint_parameters(model))
    expected = dict(model.merge_and_unload().named_parameters())  # type: ignore[operator]
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, expected[name].detach(), rtol=0, atol=0)
