"""A GPT-OSS with MXFP4 experts: loaded, adapted, merged, and proved to be the checkpoint's."""

from pathlib import Path
from typing import Any

import pytest
import torch
from gpt_oss_models import recipe
from peft import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from syncline.bridges.receipt import parameter_digests
from syncline.config.schema import Learner, Lora, Model, Recomputation
from syncline.errors import ConfigError, SyncError
from syncline.learner.adapter import AdapterLayers, base_parameters, plain_parameters
from syncline.learner.model import checkpoint_parameters, load_model, trainable_parameters
from syncline.learner.mxfp4 import is_expert, stored_experts

CPU = torch.device("cpu")
EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
LORA = Lora(rank=4, alpha=8, target_parameters=EXPERTS)


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    return recipe("small_model").build(tmp_path_factory.mktemp("model"))


def load(path: Path, lora: Lora | None = LORA, dtype: Any = "bfloat16", running: Learner | None = None) -> Any:
    return load_model(Model(path=str(path), dtype=dtype, lora=lora), device=CPU, running=running)


@torch.no_grad()
def moved(model: Any, scale: float = 0.1) -> Any:
    torch.manual_seed(1)
    for _, parameter in trainable_parameters(model):
        parameter.add_(torch.randn_like(parameter) * scale)
    return model


def test_attention_and_experts_are_adapted_and_the_log_counts_them(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        model = load(path)
    names = [name for name, _ in trainable_parameters(model)]
    assert sum("experts" in name for name in names) == 2 * 2 * 2
    assert sum("self_attn" in name for name in names) == 2 * 4 * 2
    assert len(names) == 24
    assert "LoRA target parameters enumerated (4): model.layers.0.mlp.experts.gate_up_proj" in caplog.text
    assert "Trainable LoRA parameters (24)" in caplog.text
    assert "(+4 more)" in caplog.text
    assert "Loaded policy model dtype=torch.bfloat16" in caplog.text


def test_a_target_without_a_parameter_is_an_error_that_lists_what_there_is(path: Path) -> None:
    """Searching modules, not parameters, finds none of the experts, and would leave attention alone adapted."""
    lora = Lora(target_parameters=("mlp.experts.gate_up_proj", "experts.w1"))
    with pytest.raises(ConfigError, match=r"target_parameters: experts\.w1 is .* there are .*mlp\.experts\.down_proj"):
        load(path, lora)


def test_the_base_has_the_checkpoints_names(path: Path) -> None:
    base, plain = dict(base_parameters(load(path))), dict(load(path, None).named_parameters())
    assert list(base) == list(plain)
    assert all(torch.equal(base[name], plain[name]) for name in base)


def test_layers_of_experts_have_a_pair_an_expert_of_which_peft_computes_the_same(path: Path) -> None:
    model = moved(load(path))
    layers = dict(AdapterLayers()(model))
    assert len(layers) == 2 * (4 + 2)
    layer = layers["model.layers.1.mlp.experts.gate_up_proj"]
    assert (tuple(layer.a.shape), tuple(layer.b.shape), layer.scaling) == ((4, 4, 256), (4, 256, 4), 2.0)
    wrapper = model.get_base_model().get_submodule("model.layers.1.mlp.experts.base_layer")
    delta = layer.scaling * (layer.b @ layer.a).transpose(1, 2)
    torch.testing.assert_close(wrapper.get_delta_weight("default").float(), delta.bfloat16().float())


@pytest.mark.parametrize("only", EXPERTS)
def test_experts_of_which_one_matrix_is_adapted_are_refused(path: Path, only: str) -> None:
    other = next(name for name in EXPERTS if name != only).rpartition(".")[2]
    with pytest.raises(SyncError, match=rf"{only}: vLLM serves adapters of both.*add model\.layers.*{other}"):
        dict(AdapterLayers()(load(path, Lora(rank=4, target_parameters=(only,)))))


def test_merged_experts_are_what_peft_merges(path: Path) -> None:
    model = moved(load(path, dtype="float32"))
    merged = dict(checkpoint_parameters(model))
    expected = dict(model.merge_and_unload().named_parameters())
    assert list(merged) == list(expected)
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, expected[name].detach(), atol=1e-6, rtol=1e-5)


def test_gradients_reach_every_pair_also_of_layers_that_are_computed_again(path: Path) -> None:
    token_ids = torch.randint(9, 80, (1, 40))
    found = []
    for what in ("none", "full"):
        running = Learner(recomputation=Recomputation.model_validate({"what": what}), attention="eager")
        torch.manual_seed(0)
        model = moved(load(path, dtype="float32", running=running))
        model(input_ids=token_ids, use_cache=False).logits.square().mean().backward()
        found.append({name: p.grad for name, p in trainable_parameters(model)})
    for name, gradient in found[0].items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(gradient, found[1][name], msg=lambda text, name=name: f"{name}: {text}")


def test_the_learners_values_are_proved_to_be_the_checkpoints_blocks(path: Path) -> None:
    model = load(path)
    digests = stored_experts(dict(base_parameters(model)), path)
    stored = {name: tensor for name, tensor in load_file(path / "model.safetensors").items() if is_expert(name)}
    assert digests == parameter_digests(stored.items())
    assert len(digests) == 2 * 6
    assert not any(is_expert(name) for name, _ in plain_parameters(model))


def test_a_value_that_is_not_the_checkpoints_is_named(path: Path, tmp_path: Path) -> None:
    base = dict(base_parameters(load(path)))
    name = "model.layers.1.mlp.experts.down_proj"
    tensors = load_file(path / "model.safetensors")
    tensors[f"{name}_scales"][0, 0, 0] += 1
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(SyncError, match=rf"^{name}: the learner's values are not those of the blocks"):
        stored_experts(base, tmp_path)


def test_a_checkpoint_of_the_adapter_is_one_that_peft_loads(path: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    model = moved(load(path))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(load(path, None), tmp_path)
    for name, tensor in get_peft_model_state_dict(again).items():
        torch.testing.assert_close(tensor, get_peft_model_state_dict(model)[name])
