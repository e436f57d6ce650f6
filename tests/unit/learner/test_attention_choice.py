"""A kernel is taken for what it computes here, not for its name."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from syncline.errors import ConfigError
from syncline.learner import attention_choice
from syncline.learner.attention import ATTENTION, WRITTEN_OUT, packed_attention
from syncline.learner.attention_choice import TOLERANCE, choose_attention

CPU = torch.device("cpu")
CONFIG = SimpleNamespace(model_type="qwen2", num_attention_heads=4, num_key_value_heads=2, hidden_size=32)
SINKS = SimpleNamespace(**vars(CONFIG) | {"model_type": "gpt_oss", "sliding_window": 16})


def test_a_cpu_gets_sdpa() -> None:
    assert choose_attention("auto", CONFIG, device=CPU, dtype=torch.float32) == ATTENTION


def test_a_name_that_is_none_of_ours_is_left_to_transformers() -> None:
    name = "kernels-community/flash-attn3"
    assert choose_attention(name, CONFIG, device=CPU, dtype=torch.float32) == name


@pytest.mark.parametrize("asked", ["flash", "flash3", "flash4"])
def test_a_gpu_kernel_on_a_cpu_is_refused_by_name(asked: str) -> None:
    with pytest.raises(ConfigError, match=rf"learner.attention: '{asked}' needs a GPU.* set it to auto"):
        choose_attention(asked, CONFIG, device=CPU, dtype=torch.float32)


@pytest.mark.parametrize("asked", ["sdpa", "eager", "flex_attention"])
def test_masks_made_of_positions_are_not_for_families_that_rotate_in_three(asked: str) -> None:
    """Of the three numbers a token transformers makes one causal mask over all packed sequences."""
    rotates = SimpleNamespace(**vars(CONFIG) | {"model_type": "qwen2_vl"})
    with pytest.raises(ConfigError, match=rf"learner.attention: '{asked}' lets packed sequences.* set it to auto"):
        choose_attention(asked, rotates, device=CPU, dtype=torch.float32)
    assert choose_attention(asked, CONFIG, device=CPU, dtype=torch.float32) == asked


def leaking(module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
    """Sees across the borders."""
    whole = torch.tensor([0, query.shape[2]], dtype=torch.int32)
    told = kwargs | {"cu_seq_lens_q": whole, "max_length_q": query.shape[2]}
    return packed_attention(module, query, key, value, mask, **told)


def absent(*args: Any, **kwargs: Any) -> Any:
    raise ImportError("No module named 'flash'")


@pytest.mark.parametrize(
    ("compute", "fault"), [(packed_attention, None), (leaking, "relative error"), (absent, "ImportError: No module")]
)
def test_a_candidate_is_tried_against_float32(compute: Any, fault: str | None) -> None:
    kernel = attention_choice._Kernel(compute=compute)
    found = attention_choice._fault(kernel, CONFIG, CPU, torch.bfloat16)
    assert found is None if fault is None else fault in str(found)


def test_bfloat16_itself_is_well_within_the_tolerance() -> None:
    kernel = attention_choice._Kernel()
    assert 0 < attention_choice._error(kernel, CONFIG, CPU, torch.bfloat16) < TOLERANCE / 2


def without_sinks(*args: Any, s_aux: Any, **kwargs: Any) -> Any:
    """As FlashAttention 2 in transformers: what it does not know is dropped."""
    return packed_attention(*args, **kwargs)


def sinks_that_pass_no_gradient(*args: Any, s_aux: Any, **kwargs: Any) -> Any:
    return packed_attention(*args, s_aux=s_aux.detach() + 0 * s_aux, **kwargs)


def without_the_window(*args: Any, sliding_window: Any, **kwargs: Any) -> Any:
    return packed_attention(*args, **kwargs)


@pytest.mark.parametrize(
    ("compute", "works"),
    [
        (packed_attention, True),
        (without_sinks, False),
        (sinks_that_pass_no_gradient, False),
        (without_the_window, False),
    ],
)
def test_a_model_with_sinks_tries_candidates_with_sinks_and_its_window(compute: Any, works: bool) -> None:
    fault = attention_choice._fault(attention_choice._Kernel(compute=compute), SINKS, CPU, torch.bfloat16)
    assert (fault is None) is works


def test_of_several_names_the_first_that_works_is_taken_and_the_log_says_so(caplog: pytest.LogCaptureFixture) -> None:
    asked = "kernels-community/vllm-flash-attn3, flash3, auto"
    with caplog.at_level("INFO"):
        assert choose_attention(asked, SINKS, device=CPU, dtype=torch.float32) == ATTENTION
    assert "'kernels-community/vllm-flash-attn3' needs a GPU" in caplog.text
    assert "attention: written out" in caplog.text


def test_where_no_kernel_works_sinks_are_written_out(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = attention_choice._Kernel(compute=absent)
    monkeypatch.setattr(attention_choice, "_KERNELS", {"flash": broken})
    assert attention_choice._best("auto", SINKS, CPU, torch.bfloat16) == WRITTEN_OUT
    with pytest.raises(ConfigError, match="no kernel works"):
        attention_choice._best("auto", CONFIG, CPU, torch.bfloat16)


def test_a_kernel_that_cannot_be_had_is_named() -> None:
    fault = attention_choice._hub_fault("kernels-community/vllm-flash-attn3", SINKS, CPU, torch.bfloat16)
    assert fault is not None
    assert "kernels" in fault
