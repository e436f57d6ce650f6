"""A small model on a GPU, packed and plain, and samples of several lengths for it."""

import copy

import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from syncline.learner.attention import register_attention
from syncline.types import Completion, FinishReason, TrainingSample, VersionSpan

LENGTHS = (700, 300, 300, 40, 9)


def sample(length: int, seed: int) -> TrainingSample:
    ids = torch.randint(3, 900, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    answer = tuple(ids[4:])
    return TrainingSample.from_completion(
        tuple(ids[:4]),
        Completion(answer, (-1.0,) * len(answer), (VersionSpan(0, 0, len(answer)),), FinishReason.STOP),
    )


def models() -> tuple:
    """The same weights: packed bf16 on the GPU's varlen attention, and fp32 eager as the truth."""
    config = Qwen2Config(
        vocab_size=1024,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    exact = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).cuda()
    packed = AutoModelForCausalLM.from_config(
        copy.deepcopy(config), attn_implementation=register_attention(), dtype=torch.bfloat16
    )
    packed.load_state_dict({k: v.bfloat16() for k, v in exact.state_dict().items()})
    exact.load_state_dict({k: v.bfloat16().float() for k, v in exact.state_dict().items()})
    return packed.cuda(), exact
