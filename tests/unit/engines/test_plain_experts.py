"""Experts of a CPU engine compute what transformers computes, each token with its own adapter."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gpt_oss_models import recipe
from transformers.integrations.mxfp4 import convert_moe_packed_tensors
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

from syncline.engines.vllm import plain_experts

pytest.importorskip("vllm")
TOKENS, RANK, SLOTS = 12, 3, 2
CONFIG = recipe("small_model").configuration(hidden_size=64, intermediate_size=32)


@torch.no_grad()
def test_values_are_those_of_transformers_with_the_tokens_adapter_merged() -> None:
    torch.manual_seed(0)
    experts: Any = GptOssExperts(CONFIG)
    for parameter in experts.parameters():
        parameter.normal_(0, 0.3)
    stored = {name: recipe("small_model").quantise(getattr(experts, name).transpose(1, 2)) for name in MATRICES}
    base = {name: convert_moe_packed_tensors(*stored[name]).float() for name in MATRICES}
    slots = {name: adapters(*base[name].shape) for name in MATRICES}
    x, lora_indices = torch.randn(TOKENS, 64), torch.tensor([-1, 0, 1] * 4)
    weights, chosen = torch.rand(TOKENS, 2), torch.stack([torch.randperm(4)[:2] for _ in range(TOKENS)])
    ours = computed(stored, experts, slots, x, lora_indices, weights, chosen)
    for index in (-1, 0, 1):
        for name in MATRICES:
            a, b = (stack[index] for stack in slots[name])
            getattr(experts, name).copy_(base[name] + (b @ a).transpose(1, 2) * (index >= 0))
        expected = experts(x, chosen, weights)
        own = lora_indices == index
        torch.testing.assert_close(ours[own], expected[own], atol=1e-4, rtol=1e-4)


MATRICES = ("gate_up_proj", "down_proj")


def adapters(experts: int, inputs: int, outputs: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(SLOTS, experts, RANK, inputs) * 0.3, torch.randn(SLOTS, experts, outputs, RANK) * 0.3


def computed(stored: Any, experts: Any, slots: Any, x: Any, lora_indices: Any, weights: Any, chosen: Any) -> Any:
    kernel: Any = object.__new__(plain_experts._experts())
    kernel.quant_config = SimpleNamespace(
        w1_bias=experts.gate_up_proj_bias,
        w2_bias=experts.down_proj_bias,
        w1_scale=stored["gate_up_proj"][1],
        w2_scale=stored["down_proj"][1],
    )
    (a13, b13), (a2, b2) = (slots[name] for name in MATRICES)
    kernel._lora_context = SimpleNamespace(
        w13_lora_a_stacked=(a13,),
        w13_lora_b_stacked=(b13,),
        w2_lora_a_stacked=(a2,),
        w2_lora_b_stacked=(b2,),
        punica_wrapper=SimpleNamespace(token_lora_indices=lora_indices),
    )
    output = torch.empty_like(x)
    blocks = [stored[name][0].flatten(-2) for name in MATRICES]
    kernel.apply(output, x, *blocks, weights, chosen)
    return output
