"""A small model that answers every question with a digit in a box, and questions it is right about now and then.

Made where it is needed, in seconds: a Qwen2 of a hundred thousand parameters, taught by a short supervised run to
write `\\boxed{d}` with d at random, so that GSM8K's rewards differ within a group.
"""

import json
import string
from pathlib import Path

import torch

DIGITS = "0123"
CHARACTERS = string.digits + string.ascii_letters + string.punctuation + " \n"
QUESTION_CHARS = 6
TEMPLATE = f"{{{{ messages[0].content[:{QUESTION_CHARS}] }}}}"
"""Of the prompt, the model sees no more."""


def make_boxing_model(folder: Path, *, num_steps: int = 150) -> Path:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=3 + len(CHARACTERS),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        eos_token_id=1,
        bos_token_id=None,
        pad_token_id=0,
    )
    model = Qwen2ForCausalLM(config)
    tokenizer = save_tokenizer(folder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.0)
    for _ in range(num_steps):
        texts = [question(int(n)) + rf"\boxed{{{DIGITS[n % len(DIGITS)]}}}" for n in torch.randint(1000, (32,))]
        ids = torch.tensor([[*tokenizer.encode(text), 1] for text in texts])
        labels = ids.clone()
        labels[:, :QUESTION_CHARS] = -100
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def question(n: int) -> str:
    """Which digit is right cannot be read off it by so small a model in so short a time."""
    return f"q{n * 7919 % 100000:05d}"


def save_tokenizer(folder: Path):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", "<unk>", *CHARACTERS]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    return fast


def write_gsm8k(folder: Path, *, num_rows: int = 64) -> None:
    """`openai/gsm8k` as a folder here, which `datasets` finds before it asks the hub."""
    target = folder / "openai" / "gsm8k"
    target.mkdir(parents=True)
    for split, start in (("train", 0), ("test", num_rows)):
        numbers = range(start, start + num_rows)
        rows = [{"question": question(n), "answer": f"#### {DIGITS[n % len(DIGITS)]}"} for n in numbers]
        (target / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = "".join(f"  - {{split: {split}, path: {split}.jsonl}}\n" for split in ("train", "test"))
    (target / "README.md").write_text(f"---\nconfigs:\n- config_name: main\n  data_files:\n{files}---\n")
