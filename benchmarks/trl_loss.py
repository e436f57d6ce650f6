"""TRL's own GRPO loss on given rollouts: its trainer's `_compute_loss` and a backward pass, micro-batch by micro-batch.

With vLLM as the sampler TRL first scores all completions without a gradient, for its importance correction
(`old_per_token_logps`); what that costs is told apart. Padding is done before the clock starts, as TRL does it when it
generates; liger's kernels as its trainer applies them.
"""

import tempfile
from dataclasses import dataclass
from typing import Any

import torch
from learning import TEMPERATURE, Load, Reading, measured, plain_model, useful_flops

from syncline.bench.shapes import tokenizer
from syncline.learner.advantages import group_advantages


@dataclass(frozen=True, slots=True)
class Settings:
    rows: int
    """Completions a micro-batch, at most."""
    recompute: bool
    old_logprobs: bool
    """Score first, as with vLLM."""
    liger: bool


def trl(shape: str, load: Load, settings: Settings, *, name: str, device: torch.device, passes: int) -> Reading:
    model = plain_model(shape, load, device)
    total = len(load.completions)
    rows = max(n for n in range(1, max(1, min(settings.rows, total)) + 1) if total % n == 0)
    batches, liger, recompute = _batches(load, rows, device), settings.liger, settings.recompute
    trainer = _trainer(model, load, rows, len(batches), recompute=recompute, liger=liger, device=device)
    trainer.current_gradient_accumulation_steps = len(batches)
    if liger:
        from transformers.integrations.liger import apply_liger_kernel

        apply_liger_kernel(model, {"fused_linear_cross_entropy": False})
    if recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()

    def once() -> dict[str, float]:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        for batch in batches:
            scored = {"old_per_token_logps": _scored(trainer, model, batch)} if settings.old_logprobs else {}
            trainer._compute_loss(model, batch | scored).backward()
        return {"peak": torch.cuda.max_memory_allocated()} if device.type == "cuda" else {}

    seconds, held, report, norm = measured(once, model, device, passes)
    widths = load.prompt + max(load.completions)
    return Reading(
        name, shape, load.name, seconds, load.num_tokens, widths * len(load.completions), widths * rows,
        useful_flops(model, load), int(report["peak"]) - held if report else None, norm,
    )  # fmt: skip


@torch.no_grad()
def _scored(trainer: Any, model: Any, batch: dict[str, Any]) -> torch.Tensor:
    ids = torch.cat((batch["prompt_ids"], batch["completion_ids"]), dim=1)
    mask = torch.cat((batch["prompt_mask"], batch["completion_mask"]), dim=1)
    return trainer._get_per_token_logps_and_entropies(model, ids, mask, batch["completion_ids"].shape[1])[0]


def _trainer(model: Any, load: Load, rows: int, num_batches: int, *, recompute: bool, liger: bool, device: Any) -> Any:
    from datasets import Dataset  # pyright: ignore[reportMissingImports]  (TRL's)
    from datasets.table import InMemoryTable  # pyright: ignore[reportMissingImports]
    from trl.trainer.grpo_config import GRPOConfig  # pyright: ignore[reportMissingImports]
    from trl.trainer.grpo_trainer import GRPOTrainer  # pyright: ignore[reportMissingImports]

    prompts = Dataset(InMemoryTable.from_pydict({"prompt": ["1"] * 64}), fingerprint="prompts")
    args = GRPOConfig(
        output_dir=tempfile.mkdtemp(prefix="trl-"),
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=num_batches,
        num_generations=load.rollouts_per_group,
        max_completion_length=max(load.completions),
        loss_type="dapo",
        beta=0.0,
        temperature=TEMPERATURE,
        bf16=device.type == "cuda",
        use_cpu=device.type != "cuda",
        gradient_checkpointing=recompute,
        use_liger_kernel=liger,
        report_to="none",
        disable_tqdm=True,
    )
    return GRPOTrainer(
        model=model,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=args,
        train_dataset=prompts,
        processing_class=tokenizer(),
    )


def _batches(load: Load, rows: int, device: torch.device) -> list[dict[str, Any]]:
    """TRL pads all completions of a step to the longest."""
    scaled = group_advantages(load.groups, "group")
    told = [
        (r.samples[0].token_ids, a) for g in load.groups for r, a in zip(g.rollouts, scaled[g.group_id], strict=True)
    ]
    width, num_tokens = max(load.completions), torch.tensor(float(sum(load.completions)), device=device)
    batches = []
    for start in range(0, len(told), rows):
        part = told[start : start + rows]
        completions = [torch.tensor(tokens[load.prompt :]) for tokens, _ in part]
        ids, mask = torch.zeros(len(part), width, dtype=torch.int64), torch.zeros(len(part), width, dtype=torch.int64)
        for row, tokens in enumerate(completions):
            ids[row, : len(tokens)], mask[row, : len(tokens)] = tokens, 1
        prompts = torch.tensor([tokens[: load.prompt] for tokens, _ in part])
        batch = {
            "prompt_ids": prompts,
            "prompt_mask": torch.ones_like(prompts),
            "completion_ids": ids,
            "completion_mask": mask,
            "advantages": torch.tensor([advantage for _, advantage in part]),
        }
        batches.append({name: value.to(device) for name, value in batch.items()} | {"num_items_in_batch": num_tokens})
    return batches
