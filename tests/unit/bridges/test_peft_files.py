"""Experts' adapters are named and shaped in files as PEFT itself does it."""

from pathlib import Path

import torch
from gpt_oss_models import recipe
from peft import get_peft_model_state_dict

from syncline.bridges.adapter import AdapterLayout
from syncline.bridges.peft_files import file_name, from_file, to_file
from syncline.config.schema import Lora
from syncline.learner.adapter import AdapterLayers
from syncline.learner.model import add_lora


def test_names_and_values_are_those_of_peft_and_come_back(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(recipe("small_model").configuration())
    experts = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
    model = add_lora(model, Lora(rank=4, alpha=4, target_parameters=experts))
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.normal_()
    layers = dict(AdapterLayers()(model))
    layout = AdapterLayout.of(layers, "float32")
    buffer = layout.new_buffer(torch.device("cpu"))
    layout.on(buffer).pack(layers)
    written = {file_name(n, v.dim()): to_file(n, v) for n, v in layout.views(buffer).items()}
    expected = get_peft_model_state_dict(model)
    assert written.keys() == expected.keys()
    for name, tensor in written.items():
        torch.testing.assert_close(tensor, expected[name].detach(), rtol=0, atol=0)
    for name, view in layout.views(buffer).items():
        assert torch.equal(from_file(name, written[file_name(name, view.dim())], view.shape), view)
