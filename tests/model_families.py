"""The model families a weight bridge promises, as random models of a few hundred thousand parameters."""

from pathlib import Path
from typing import Any

import torch
from real_engine import save_tokenizer

SIZES: dict[str, Any] = {
    "vocab_size": 70,  # not a multiple of 64, so vLLM pads it
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "eos_token_id": 1,
    "bos_token_id": None,
    "pad_token_id": 0,
}
GEMMA = {"head_dim": 32, "tie_word_embeddings": True}
LAYER_TYPES = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
PHI = {"num_key_value_heads": 4, "intermediate_size": 512}  # as the real one; vLLM 0.26 knows no other ratios
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128, "decoder_sparse_step": 1}
LATENT = {
    "kv_lora_rank": 512,  # with the rope's 64: the only width that vLLM's kernels for latent attention have
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
    "first_k_dense_replace": 1,
}

DENSE: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2.5-untied": ("qwen2", {"tie_word_embeddings": False}),
    "qwen3": ("qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    "llama2": ("llama", {"num_key_value_heads": 4}),
    "llama3.1": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "llama3.2-tied": ("llama", {"rope_parameters": LLAMA3_ROPE | {"factor": 32.0}, "tie_word_embeddings": True}),
    "yi": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e6}}),
    "deepseek-coder": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e5}}),
    "mistral": ("mistral", {"sliding_window": 8}),
    "gemma": ("gemma", GEMMA),
    "gemma2": ("gemma2", {**GEMMA, **LAYER_TYPES, "query_pre_attn_scalar": 24, "attn_logit_softcapping": 5.0}),
    "gemma3": ("gemma3_text", {**GEMMA, **LAYER_TYPES, "query_pre_attn_scalar": 24}),
    "phi2": ("phi", {**PHI, "partial_rotary_factor": 0.5, "resid_pdrop": 0.1}),
    "phi3": ("phi3", {"sliding_window": None}),
    "starcoder2": ("starcoder2", {"sliding_window": None, "tie_word_embeddings": True, "residual_dropout": 0.1}),
}
"""Name → model type and what it has beside `SIZES`."""

EXPERT: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2-moe": ("qwen2_moe", {**EXPERTS, "shared_expert_intermediate_size": 128}),
    "qwen3-moe": ("qwen3_moe", {**EXPERTS, "head_dim": 32}),
    "deepseek-v2": ("deepseek_v2", LATENT),
}


def save_random_model(family: str, folder: Path, *, seed: int = 0) -> Path:
    """A random model of the family with a character tokenizer; norms and biases are moved off their ones and zeros."""
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, values = (DENSE | EXPERT)[family]
    torch.manual_seed(seed)
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES | values))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.1)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder
