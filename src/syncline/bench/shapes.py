"""Models of real shapes with random weights, for benchmarks on machines without a model hub."""

from pathlib import Path
from typing import Any

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "tie_word_embeddings": True,
    },
    "narrow": {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 24,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "qwen2.5-0.5b": {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "qwen2.5-1.5b": {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "qwen2.5-7b": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
    },
    "qwen2.5-32b": {
        "hidden_size": 5120,
        "intermediate_size": 27648,
        "num_hidden_layers": 64,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "tie_word_embeddings": False,
    },
}
VOCABULARY = 151936
LAST_FILE = "tokenizer_config.json"
"""Written after the weights: a folder that has it is whole."""


def make_model(shape: str, folder: Path, *, max_length: int) -> Path:
    """Writes a bf16 model of the shape, and a character tokenizer that is enough to write prompts with."""
    import torch

    on_gpu = torch.cuda.is_available()
    build_model(shape, max_length=max_length, device="cuda" if on_gpu else "cpu").save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    if on_gpu:
        torch.cuda.empty_cache()
    return folder


def config(shape: str, *, max_length: int) -> Any:
    from transformers import Qwen2Config

    return Qwen2Config(
        vocab_size=VOCABULARY,
        max_position_embeddings=max_length,
        eos_token_id=1,
        bos_token_id=None,
        pad_token_id=0,
        architectures=["Qwen2ForCausalLM"],
        dtype="bfloat16",
        **SHAPES[shape],
    )


def build_model(shape: str, *, max_length: int, device: str) -> Any:
    """The model with random weights in bf16, on `device`."""
    import torch
    from transformers import Qwen2ForCausalLM

    torch.manual_seed(0)
    with torch.device(device):
        return Qwen2ForCausalLM._from_config(config(shape, max_length=max_length), dtype=torch.bfloat16)


def tokenizer() -> Any:
    """A character each, which is enough to write prompts with."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", "<unk>", *map(chr, range(32, 127))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
