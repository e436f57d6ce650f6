"""Models of real shapes with random weights, for benchmarks on machines without a model hub."""

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

_COLUMNS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "tie_word_embeddings",
)
_ROWS = {
    "tiny": (64, 128, 2, 2, 1, True),
    "narrow": (128, 256, 24, 2, 2, True),
    "qwen2.5-0.5b": (896, 4864, 24, 14, 2, True),
    "qwen2.5-1.5b": (1536, 8960, 28, 12, 2, True),
    "qwen2.5-7b": (3584, 18944, 28, 28, 4, False),
    "qwen2.5-32b": (5120, 27648, 64, 40, 8, False),
}
SHAPES: dict[str, dict[str, Any]] = {name: dict(zip(_COLUMNS, row, strict=True)) for name, row in _ROWS.items()}
VOCABULARY = 151936
LAST_FILE = "tokenizer_config.json"
"""Written after the weights: a folder that has it is whole."""


def make_model(shape: str, folder: Path, *, max_length: int) -> Path:
    """Writes a bf16 model of the shape, and a character tokenizer that is enough to write prompts with. A process of
    its own makes it on a GPU, since half a GB of one stays with whoever has used it."""
    import torch

    if not torch.cuda.is_available():
        return _written(shape, folder, max_length, "cpu")
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(_written, shape, folder, max_length, "cuda").result()


def _written(shape: str, folder: Path, max_length: int, device: str) -> Path:
    build_model(shape, max_length=max_length, device=device).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
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
