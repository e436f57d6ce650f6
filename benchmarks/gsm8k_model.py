"""A model that answers GSM8K's questions in the asked form, from a quantised file: what `offline_gsm8k.py` begins with.

    python benchmarks/gsm8k_model.py SmolLM2-135M-Instruct.Q4_1.gguf runs/smollm2     # needs the package gguf

`folder_of_gguf` writes the file's weights, dequantised to bfloat16, with its tokenizer and chat template. `warm_up`
then trains on worked solutions, so that some samples are right and some wrong: plain PyTorch, weights in float32,
products in bfloat16 on a GPU, batches of like length. The learning rate ends at 0 with the last batch or with the time,
whichever comes first.
"""

import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from syncline.envs.rendering import load_tokenizer, rendered
from syncline.offline.questions import Question
from syncline.types import Message

IGNORED = -100
WARM_STEPS = 10

Row = tuple[list[int], list[int]]
"""Tokens of the prompt, and of the answer with its end."""


def folder_of_gguf(file: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    read = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    tokenizer = AutoTokenizer.from_pretrained(**read)
    quantised: Any = AutoModelForCausalLM.from_pretrained(**read, dtype=torch.bfloat16)
    config = quantised.config
    for name in ("bos", "eos", "pad"):  # some versions of transformers read others off the file
        setattr(tokenizer, f"{name}_token", tokenizer.convert_ids_to_tokens(getattr(config, f"{name}_token_id")))
    tokenizer.clean_up_tokenization_spaces = False  # texts are what was sampled
    if hasattr(config, "quantization_config"):  # a model that remembers it cannot be saved
        del config.quantization_config
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    plain.load_state_dict(quantised.state_dict())
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def worked_answer(question: Question) -> str:
    """GSM8K's rationale without the calculator's marks, then the line that the prompt asks for."""
    lines, _, gold = question.solution.rpartition("####")
    while "<<" in lines:
        before, _, rest = lines.partition("<<")
        lines = before + rest.partition(">>")[2]
    return f"{lines.strip()}\nAnswer: {gold.strip()}".strip() if lines else gold.strip()


def warm_up(
    model_path: Path, questions: list[Question], folder: Path, *, prompt: str, epochs: int, seconds: float, rate: float
) -> dict[str, Any]:
    """Writes the trained model; returns counts, and the loss over the first and the last tenth of the steps."""
    from transformers import AutoModelForCausalLM

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    tokenizer = load_tokenizer(str(model_path))
    model: Any = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    model.to(device)
    batches = list(_batches([_row(tokenizer, one, prompt) for one in questions], tokenizer.eos_token_id)) * epochs
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
    losses: list[float] = []
    started = time.monotonic()
    for step, (ids, labels) in enumerate(batches):
        gone = max(step / len(batches), (time.monotonic() - started) / seconds)
        if gone >= 1:
            break
        optimizer.param_groups[0]["lr"] = rate * min(1 - gone, (step + 1) / WARM_STEPS)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = _loss(model, ids.to(device), labels.to(device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.to(torch.float32 if device.type == "cpu" else torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    count = max(1, len(losses) // 10)
    first, last = losses[:count], losses[-count:]
    return {
        "questions": len(questions),
        "steps": f"{len(losses)} of {len(batches)}",
        "seconds": round(time.monotonic() - started, 1),
        "loss": f"{sum(first) / len(first):.3f} -> {sum(last) / len(last):.3f}",
    }


def _row(tokenizer: Any, question: Question, prompt: str) -> Row:
    message = Message("user", prompt.replace("{question}", question.question))
    answer = tokenizer.encode(worked_answer(question), add_special_tokens=False)
    return rendered(tokenizer, [message]), [*answer, tokenizer.eos_token_id]


def _batches(rows: list[Row], pad: int, size: int = 64) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Ids and labels, [B, T], of rows of like length, in an order of their own."""
    rows = sorted(rows, key=lambda row: len(row[0]) + len(row[1]))
    parts = [rows[i : i + size] for i in range(0, len(rows), size)]
    random.Random(0).shuffle(parts)
    for part in parts:
        longest = max(len(prompt) + len(answer) for prompt, answer in part)
        ids = [p + a + [pad] * (longest - len(p) - len(a)) for p, a in part]
        labels = [[IGNORED] * len(p) + a + [IGNORED] * (longest - len(p) - len(a)) for p, a in part]
        yield torch.tensor(ids), torch.tensor(labels)


def _loss(model: Any, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Of answers alone; nothing looks at what pads a row, for it stands behind all of it."""
    hidden = model.model(input_ids=ids).last_hidden_state[:, :-1]
    asked = labels[:, 1:] != IGNORED
    return cross_entropy(model.lm_head(hidden[asked]).float(), labels[:, 1:][asked])


if __name__ == "__main__":
    folder_of_gguf(Path(sys.argv[1]), Path(sys.argv[2]))
