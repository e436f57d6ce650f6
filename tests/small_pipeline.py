"""A pipeline small enough for tests: sums, and a model that has seen that a sum is answered by a number near it."""

import json
from pathlib import Path

import torch
import yaml
from real_engine import engine_values, make_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

SUMS = [(a, b) for a in range(1, 9) for b in range(1, 5)]


def make_guessing_model(folder: Path) -> Path:
    """A fifth of its answers is right."""
    make_tiny_model(folder, hidden_size=64)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    texts = [f"{a}+{b}={max(0, a + b + off)}<eos>" for a, b in SUMS for off in (-2, -1, 0, 1, 2)]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    for _ in range(40):
        optimizer.zero_grad()
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    return folder


def write_file(folder: Path, model: Path, *, num_rounds: int = 2, bridge: str = "restart") -> Path:
    rows = [json.dumps({"question": f"{a}+{b}=", "answer": f"#### {a + b}"}) + "\n" for a, b in SUMS]
    (folder / "train.jsonl").write_text("".join(rows[:24]))
    (folder / "heldout.jsonl").write_text("".join(rows[24:]))
    values = {
        "run": {"dir": str(folder / "run")},
        "model": {"path": str(model), "max_length": 32, "lora": {"rank": 4}},
        "bridge": {"name": bridge},
        "engine": engine_values() | {"max_num_seqs": 64},
        "collect": {
            "questions": {"path": str(folder / "train.jsonl")},
            "prompt": "{question}",
            "rephrase": False,
            "num_samples": 8,
            "max_tokens": 6,
        },
        "pairs": {"heldout_fraction": 0.2},
        "dpo": {
            "num_rounds": num_rounds,
            "learning_rate": 5e-3,
            "pairs_per_step": 4,
            "microbatch_pairs": 4,
            "num_epochs": 3,
            "checkpoint_interval": 2,
            "guard": {"interval": 2, "max_drop": 5.0},
        },
        "eval": {
            "sets": [{"name": "sums", "path": str(folder / "heldout.jsonl")}],
            "prompt": "{question}",
            "max_tokens": 6,
            "num_samples": 2,
            "temperature": 1.0,
        },
    }
    (folder / "pipeline.yaml").write_text(yaml.safe_dump(values))
    return folder / "pipeline.yaml"
