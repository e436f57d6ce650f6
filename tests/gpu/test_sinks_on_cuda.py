"""torch's FlashAttention with the sink put in, in GPT-OSS's own shape, against attention that is written out."""

from types import SimpleNamespace

import pytest
import torch

from syncline.learner import attention_choice
from syncline.learner.attention import ATTENTION

GPT_OSS = SimpleNamespace(
    model_type="gpt_oss", num_attention_heads=64, num_key_value_heads=8, head_dim=64, sliding_window=128
)
CUDA = torch.device("cuda")


@pytest.mark.parametrize("name", ["flash", "flash3"])
def test_values_and_gradients_are_those_of_float32(name: str) -> None:
    kernel = attention_choice._KERNELS[name]
    if not attention_choice._is_installed(kernel):
        pytest.skip(f"{kernel.module} is not installed")
    assert attention_choice._fault(kernel, GPT_OSS, CUDA, torch.bfloat16) is None


def test_a_model_with_sinks_gets_a_kernel_here() -> None:
    asked = "kernels-community/vllm-flash-attn3,auto"
    chosen = attention_choice.choose_attention(asked, GPT_OSS, device=CUDA, dtype=torch.bfloat16)
    assert chosen in (ATTENTION, "kernels-community/vllm-flash-attn3")
