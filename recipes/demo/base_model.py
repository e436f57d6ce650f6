"""Builds the demo's base model: a small Qwen2 that adds, but not reliably, so that GRPO has something to improve.

A short supervised run: first on right sums, then on sums whose answers have digits misprinted at random. Misprints are
spread over all digits, so the right answer stays the likeliest one; sampled at temperature 1, the model errs as often
as what it read, and GRPO has only to find out which of its answers pays. Held-out sums are in neither part.

    python recipes/demo/base_model.py --out DIR [--seed N]
"""

import argparse
import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate, count, islice
from pathlib import Path

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from syncline.envs.tasks import arithmetic
from syncline.envs.tasks.arithmetic import Arithmetic, ArithmeticTask

PAD, BOS, EOS, UNK = SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")
DIGITS = "0123456789"
VOCABULARY = {token: i for i, token in enumerate((*SPECIAL, *DIGITS, *"+-*=Ġ"))}
"""Ġ is how byte-level tokenizers write the space."""
IGNORED = -100


@dataclass(frozen=True, slots=True)
class Recipe:
    """What the model depends on: `num_steps` steps on right answers, then `num_noisy_steps` on misprinted ones."""

    seed: int = 0
    digits: int = 2
    terms: int = 2
    shows_steps: bool = False
    """`12+7+5=` is answered by `12+7=19 19+5=24` in place of `24`; of sums alone."""
    misprints: float = 0.33
    """Share of an answer's digits replaced by one drawn at random: 0.70 of them stay right, so 0.4 of the answers."""
    hidden_size: int = 256
    intermediate_size: int = 512
    num_layers: int = 3
    num_heads: int = 4
    num_kv_heads: int = 2
    initializer_range: float = 0.05
    """Above the usual 0.02, with which so short a run does not get off the ground."""
    max_length: int = 64
    batch_size: int = 128
    num_warmup_steps: int = 30
    num_steps: int = 250
    num_noisy_steps: int = 150
    """The learning rate falls to 0 over these."""
    learning_rate: float = 2e-3
    num_threads: int = 2


def build_base_model(out_dir: Path, recipe: Recipe | None = None) -> Path:
    """A folder under `out_dir` with weights, config and tokenizer; an earlier build of the same recipe is reused."""
    recipe = recipe or Recipe()
    path = out_dir / f"arithmetic-{fingerprint(recipe)}"
    if path.exists():
        return path
    out_dir.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(dir=out_dir, prefix=".building-"))
    try:
        train(recipe).save_pretrained(building)
        build_tokenizer(recipe).save_pretrained(building)
        (building / "recipe.json").write_text(json.dumps(asdict(recipe), indent=2) + "\n")
        building.chmod(0o755)
        building.rename(path)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return path


def fingerprint(recipe: Recipe) -> str:
    """Hash of the recipe and of the code that makes the data and the model."""
    sources = [Path(__file__).read_bytes(), Path(arithmetic.__file__).read_bytes()]
    return hashlib.sha256(json.dumps(asdict(recipe)).encode() + b"".join(sources)).hexdigest()[:12]


def build_tokenizer(recipe: Recipe) -> Qwen2Tokenizer:
    """One token a character, nothing added in front, characters of other texts dropped.

    The class is Qwen2's own because transformers loads any tokenizer beside a Qwen2 model as one.
    """
    return Qwen2Tokenizer(
        vocab=VOCABULARY,
        merges=[],
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        model_max_length=recipe.max_length,
    )


def train(recipe: Recipe) -> Qwen2ForCausalLM:
    """float32 on the CPU; the loss is over the answer and `<eos>` alone."""
    torch.set_num_threads(recipe.num_threads)
    torch.manual_seed(recipe.seed)
    model = Qwen2ForCausalLM(_config(recipe))
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _learning_rate_factor(recipe, step))
    tasks = tasks_of(recipe, split="train")
    for step in range(recipe.num_steps + recipe.num_noisy_steps):
        ids, labels = _tensors(list(islice(tasks, recipe.batch_size)), shows_steps=recipe.shows_steps)
        hidden = model.model(input_ids=ids[:, :-1]).last_hidden_state  # [B, T-1, hidden]
        answered = labels[:, 1:] != IGNORED
        misprints = recipe.misprints if step >= recipe.num_steps else 0.0
        loss = expected_loss(model.lm_head(hidden[answered]), labels[:, 1:][answered], misprints=misprints)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model


def expected_loss(logits: torch.Tensor, targets: torch.Tensor, *, misprints: float) -> torch.Tensor:
    """Cross-entropy of `logits` [N, V], in expectation over the misprints of the digits among `targets` [N].

    The expectation is exact, where drawing misprints would drown what so short a run has learnt.
    """
    logprobs = logits.log_softmax(-1)
    first, last = VOCABULARY[DIGITS[0]], VOCABULARY[DIGITS[-1]]
    share = misprints * ((targets >= first) & (targets <= last))  # [N]
    right = logprobs.gather(-1, targets[:, None])[:, 0]
    return -((1 - share) * right + share * logprobs[:, first : last + 1].mean(-1)).mean()


@torch.no_grad()
def accuracy(model: Qwen2ForCausalLM, tasks: Sequence[ArithmeticTask]) -> tuple[float, float]:
    """Mean probability of the right answer (the expected reward at temperature 1), and the share right greedily."""
    ids, labels = _tensors(tasks)
    logprobs = model(input_ids=ids[:, :-1]).logits.log_softmax(-1)  # [B, T-1, V]
    targets = labels[:, 1:]
    answered = targets != IGNORED
    chosen = logprobs.gather(-1, targets.clamp(min=0)[..., None])[..., 0].where(answered, 0.0)
    greedy = ((logprobs.argmax(-1) == targets) | ~answered).all(-1)
    return chosen.sum(-1).exp().mean().item(), greedy.float().mean().item()


def tasks_of(recipe: Recipe, *, split: str) -> Iterator[ArithmeticTask]:
    """Endless."""
    environment = Arithmetic(seed=recipe.seed, levels=({"digits": recipe.digits, "terms": recipe.terms},))
    return (environment.task(index, split=split) for index in count())


def _config(recipe: Recipe) -> Qwen2Config:
    return Qwen2Config(
        vocab_size=len(VOCABULARY),
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.num_layers,
        num_attention_heads=recipe.num_heads,
        num_key_value_heads=recipe.num_kv_heads,
        initializer_range=recipe.initializer_range,
        max_position_embeddings=recipe.max_length,
        tie_word_embeddings=True,
        pad_token_id=VOCABULARY[PAD],
        bos_token_id=VOCABULARY[BOS],
        eos_token_id=VOCABULARY[EOS],
    )


def _learning_rate_factor(recipe: Recipe, step: int) -> float:
    left = recipe.num_steps + recipe.num_noisy_steps - step
    return min(1.0, (step + 1) / recipe.num_warmup_steps, left / recipe.num_noisy_steps)


def steps(task: ArithmeticTask) -> list[str]:
    """Of a sum, from the left: `12+7=19`, `19+5=24`."""
    totals = [*accumulate(task.operands)]
    return [f"{a}+{b}={a + b}" for a, b in zip(totals, task.operands[1:], strict=False)]


def _tensors(tasks: Sequence[ArithmeticTask], *, shows_steps: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and labels, `[B, T]` both, padded on the right; labels are `IGNORED` outside the answer."""
    prompts = [[VOCABULARY[c] for c in f"{task.expression}="] for task in tasks]
    texts = ["Ġ".join(steps(task)) if shows_steps else str(task.answer) for task in tasks]
    answers = [[*(VOCABULARY[c] for c in text), VOCABULARY[EOS]] for text in texts]
    length = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
    ids = torch.full((len(tasks), length), VOCABULARY[PAD])
    labels = torch.full((len(tasks), length), IGNORED)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        end = len(prompt) + len(answer)
        ids[row, :end] = torch.tensor(prompt + answer)
        labels[row, len(prompt) : end] = torch.tensor(answer)
    return ids, labels


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the demo's base model.")
    parser.add_argument("--out", type=Path, required=True, help="folder to build in; an earlier build there is reused")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    recipe, start = Recipe(seed=args.seed), time.monotonic()
    path = build_base_model(args.out, recipe)
    seconds = time.monotonic() - start
    model = Qwen2ForCausalLM.from_pretrained(path)
    print(f"{path} in {seconds:.1f} s")
    for split in ("train", "heldout"):
        sampled, greedy = accuracy(model, list(islice(tasks_of(recipe, split=split), 512)))
        print(f"{split}: right {sampled:.3f} of the time at temperature 1, {greedy:.3f} greedily")


if __name__ == "__main__":
    main()
