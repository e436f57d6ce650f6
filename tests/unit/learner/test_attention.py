import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from syncline.errors import ConfigError
from syncline.learner.attention import ATTENTION, check_attention, refuse_own_attention, register_attention

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
MODELS = {
    "qwen2": {},
    "llama": {"attention_bias": True},
    "mistral": {"sliding_window": 3},
    "gemma2": {
        "sliding_window": 3,
        "layer_types": ["sliding_attention", "full_attention"],
        "attn_logit_softcapping": 0.01,
        "query_pre_attn_scalar": 5,
    },
    "gemma3_text": {"sliding_window": 3, "layer_types": ["sliding_attention", "full_attention"]},
    "gpt_oss": {
        "sliding_window": 3,
        "layer_types": ["sliding_attention", "full_attention"],
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
}
LENGTHS = (7, 5, 5, 5, 2, 1)
"""Runs of equal length, sequences longer and shorter than the window, and one of a single token."""


def model(kind: str, attention: str) -> Any:
    register_attention()
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SIZES, **MODELS.get(kind, {})})
    made = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    for sinks in (parameter for name, parameter in made.named_parameters() if name.endswith("sinks")):
        torch.nn.init.normal_(sinks, generator=torch.Generator().manual_seed(0))
    return made


def name_in_front(name: str) -> Callable[[str], str]:
    return lambda text: f"{name}: {text}"


def packed_logits(packed: Any, token_ids: torch.Tensor, lengths: tuple[int, ...] = LENGTHS, **extra: Any) -> Any:
    borders, longest = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32), max(lengths)
    inputs = {
        "input_ids": token_ids[None],
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "cu_seq_lens_q": borders,
        "cu_seq_lens_k": borders,
        "max_length_q": longest,
        "max_length_k": longest,
        "use_cache": False,
    }
    return packed(**(inputs | extra)).logits[0]


@pytest.mark.parametrize("kind", MODELS)
def test_packed_equals_each_sequence_alone_in_value_and_gradient(kind: str) -> None:
    packed, alone = model(kind, ATTENTION), model(kind, "eager")
    token_ids = torch.randint(SIZES["vocab_size"], (sum(LENGTHS),))
    logits = packed_logits(packed, token_ids)
    expected = torch.cat([alone(input_ids=part[None], use_cache=False).logits[0] for part in token_ids.split(LENGTHS)])
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-4)
    pull = torch.randn_like(logits)
    (logits * pull).sum().backward()
    (expected * pull).sum().backward()
    for (name, ours), theirs in zip(packed.named_parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-4, rtol=1e-4, msg=name_in_front(name))


def test_a_sequence_does_not_see_its_neighbours() -> None:
    packed = model("qwen2", ATTENTION)
    token_ids = torch.randint(SIZES["vocab_size"], (10,))
    changed = token_ids.clone()
    changed[0] = (changed[0] + 1) % SIZES["vocab_size"]
    before, after = (packed_logits(packed, tokens, (4, 6)) for tokens in (token_ids, changed))
    assert not torch.equal(before[3], after[3])
    assert torch.equal(before[4:], after[4:])


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        ({"s_aux": torch.zeros(4), "softcap": 1.0}, "attention sinks"),
        ({"is_causal": False}, "not causal"),
        ({"cu_seq_lens_q": None}, "without cu_seq_lens_q"),
        ({"max_length_q": None}, "without max_length_q"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(extra: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=rf"Qwen2Attention asks .*{named}"):
        packed_logits(model("qwen2", ATTENTION), torch.zeros(8, dtype=torch.int64), (8,), **extra)


def test_padding_is_refused() -> None:
    padded = {"input_ids": torch.zeros(1, 8, dtype=torch.int64), "attention_mask": torch.ones(1, 8, dtype=torch.int64)}
    with pytest.raises(ConfigError, match="without cu_seq_lens_q"):
        model("qwen2", ATTENTION)(**padded, use_cache=False)


class Answers(TorchDispatchMode):
    """Counts the numbers that are fetched from a tensor: on a GPU each waits for all that was asked before."""

    def __init__(self) -> None:
        super().__init__()
        self.num_fetched = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.num_fetched += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["qwen2", "gemma3_text"])
def test_a_forward_pass_waits_for_no_answer(kind: str) -> None:
    token_ids = torch.randint(SIZES["vocab_size"], (sum(LENGTHS),))
    with Answers() as answers:
        packed_logits(model(kind, ATTENTION), token_ids)
    assert answers.num_fetched == 0


def test_attention_dropout_is_refused_in_training() -> None:
    packed = model("qwen2", ATTENTION)
    for layer in packed.model.layers:
        layer.self_attn.attention_dropout = 0.1
    packed_logits(packed.eval(), torch.zeros(8, dtype=torch.int64), (8,))
    with pytest.raises(ConfigError, match="attention dropout"):
        packed_logits(packed.train(), torch.zeros(8, dtype=torch.int64), (8,))


def test_layers_that_carry_a_state_are_refused_by_configuration() -> None:
    check_attention(AutoConfig.for_model("qwen2"))
    with pytest.raises(ValueError, match="linear_attention"):
        check_attention(AutoConfig.for_model("qwen3_next"))
    with pytest.raises(ValueError, match="chunked"):
        check_attention(AutoConfig.for_model("llama4_text"))


@pytest.mark.parametrize("kind", ["stablelm", "bloom", "rwkv"])
def test_families_that_compute_attention_themselves_are_refused(kind: str) -> None:
    with pytest.raises(ValueError, match=f"{kind}.*attention by itself"):
        refuse_own_attention(AutoConfig.for_model(kind))
    refuse_own_attention(AutoConfig.for_model("qwen2"))
