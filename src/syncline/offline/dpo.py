"""DPO of an adapter by TRL's trainer: guarded, resumable to the step, on the very tokens that were sampled.

The reference is what the round began with: the base with the adapter switched off, or in later rounds TRL's frozen copy
of the adapter, so no second model is loaded. TRL tokenises texts; here its preparation is replaced by the tokens that
`preferences` checked, so what was sampled is what is trained on.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from syncline.config.model_folder import known_settings
from syncline.config.offline import Dpo
from syncline.config.schema import Model
from syncline.envs.rendering import load_tokenizer
from syncline.errors import ConfigError
from syncline.learner.model import add_lora, learner_device, learner_dtype, refuse_unknown_logits, without_dropout
from syncline.offline.adapters import adapted
from syncline.offline.preferences import Preference, read_preferences
from syncline.offline.stage import Notes

ADAPTER = "adapter"
CHECKPOINTS = "checkpoints"


@dataclass(frozen=True, slots=True)
class Task:
    """One round. `start` is the adapter of the last one; `heldout` are pairs that are measured and not trained on."""

    model: Model
    pairs: Path
    heldout: Path | None = None
    start: Path | None = None
    policy: str | None = None
    """The digest of the weights that must have sampled the pairs."""
    seed: int = 0


def train_dpo(config: Dpo, task: Task, notes: Notes) -> None:
    """On one device. Writes `adapter/` into the stage's folder, `metrics.jsonl` and `last-good/` on the way; goes on
    from the newest whole checkpoint there. Raises `ConfigError` for pairs that cannot be trained on, `TrainingError`
    for a collapse."""
    from syncline.offline.guard import Watch, newest_checkpoint, save_adapter, step_of

    tokenizer = load_tokenizer(task.model.tokenizer or task.model.path)
    limits = {"max_length": task.model.max_length, "model": task.policy}
    pairs = read_preferences(task.pairs, tokenizer, **limits)
    heldout = read_preferences(task.heldout, tokenizer, **limits) if task.heldout else []
    checkpoint = newest_checkpoint(notes.folder / CHECKPOINTS)
    resumed = step_of(checkpoint) if checkpoint else 0
    probes = (heldout or pairs)[: config.guard.num_pairs]
    watch = Watch(config.guard, probes, folder=notes.folder, resumed_step=resumed)
    try:
        trainer = _trainer(config, task, notes.folder, pairs=pairs, tokenizer=tokenizer, watch=watch)
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    finally:
        watch.close()
    save_adapter(trainer.model, notes.folder / ADAPTER)
    notes.tokens = watch.num_tokens
    notes.facts |= {
        "num_pairs": len(pairs),
        "num_heldout_pairs": len(heldout),
        "num_steps": trainer.state.global_step,
        "resumed_at_step": resumed,
        "chosen_logprob_before": watch.baseline,
    }


def _trainer(config: Dpo, task: Task, folder: Path, *, pairs: Sequence[Preference], tokenizer: Any, watch: Any) -> Any:
    from datasets import Dataset
    from transformers import PrinterCallback

    from syncline.offline.guard import WholeCheckpoints

    _refuse_without_trl()
    from trl import DPOTrainer  # pyright: ignore[reportPrivateImportUsage]

    class TokenTrainer(DPOTrainer):
        """Of rows that are tokens already."""

        def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            del args, kwargs
            return dataset

    device = learner_device(config.device)
    torch.manual_seed(task.seed)
    rows = [
        {"prompt_ids": list(p.prompt_ids), "chosen_ids": list(p.chosen_ids), "rejected_ids": list(p.rejected_ids)}
        for p in pairs
    ]
    policy = load_policy(task.model, task.start, device=device)
    trainer = TokenTrainer(
        model=policy,
        args=_arguments(config, task, folder, device=device),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[WholeCheckpoints(), watch],
    )
    if task.start is None:
        policy.delete_adapter("ref")  # TRL's copy of a fresh adapter is the base with it switched off
    trainer.remove_callback(PrinterCallback)
    return trainer


def load_policy(model: Model, adapter: Path | None, *, device: torch.device) -> Any:
    """The base with the adapter of an earlier round, or a fresh one as `model.lora` says. Attention is SDPA, because
    TRL pads. Raises `ConfigError` for a path that holds no model."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig, AutoModelForCausalLM

    if model.lora is None:
        raise ConfigError(["model.lora: absent, and DPO trains an adapter; add such as {rank: 16}"])
    dtype = learner_dtype(model.dtype, device)
    known_settings(model.path)
    try:
        settings = without_dropout(AutoConfig.from_pretrained(model.path))
        base = AutoModelForCausalLM.from_pretrained(
            model.path, config=settings, dtype=dtype, attn_implementation="sdpa"
        )
    except (OSError, ValueError, StrictDataclassError) as error:
        raise ConfigError([f"model.path: {model.path!r} cannot be trained: {error}"]) from error
    refuse_unknown_logits(base.config)
    if adapter is not None:
        return adapted(base, adapter, field="--start", is_trainable=True)
    return add_lora(base, model.lora)


def _arguments(config: Dpo, task: Task, folder: Path, *, device: torch.device) -> Any:
    """Everything that TRL's versions have had other defaults for is said. One log line a step."""
    from trl import DPOConfig  # pyright: ignore[reportPrivateImportUsage]

    arguments = DPOConfig(
        output_dir=str(folder / CHECKPOINTS),
        loss_type=list(config.losses),
        loss_weights=list(config.losses.values()),
        beta=config.beta,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.schedule,
        warmup_steps=config.num_warmup_steps,
        num_train_epochs=config.num_epochs,
        per_device_train_batch_size=config.microbatch_pairs,
        gradient_accumulation_steps=config.pairs_per_step // config.microbatch_pairs,
        max_grad_norm=config.max_grad_norm,
        weight_decay=config.weight_decay,
        gradient_checkpointing=config.recompute,
        bf16=learner_dtype(task.model.dtype, device) is torch.bfloat16,
        max_length=task.model.max_length,
        save_strategy="steps",
        save_steps=config.checkpoint_interval,
        save_total_limit=2,
        logging_steps=1,
        logging_nan_inf_filter=False,
        seed=task.seed,
        use_cpu=device.type == "cpu",
        report_to="none",
        disable_tqdm=True,
    )
    if device.type == "cuda":
        arguments._n_gpu = 1  # else the trainer spreads over all that it sees, and engines' GPUs are among them
    return arguments


def _refuse_without_trl() -> None:
    try:
        import trl  # noqa: F401
    except ImportError as error:
        raise ConfigError(["dpo: needs TRL's trainer; `pip install 'syncline[offline]'`"]) from error
