"""What watches a DPO run from inside TRL's trainer: metrics, whole checkpoints, and the fall of chosen answers.

DPO rewards the margin between two answers, which also grows when both become unlikely; then the policy forgets how to
answer at all (Pal et al. 2024, arXiv:2402.13228). So the log-probability of the same chosen answers is measured again
and again: as long as it holds, the adapter is kept as `last-good`; when it has fallen too far, training stops by name.
"""

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from syncline.config.offline import Guard
from syncline.errors import TrainingError
from syncline.learner.logprobs import token_logprobs
from syncline.learner.model import causal_lm
from syncline.observe.files import read_lines, read_object, write_atomically
from syncline.observe.sinks import METRICS_FILE, JsonlSink
from syncline.offline.preferences import Preference

COMPLETE_FILE = "complete"
BASELINE_FILE = "guard.json"
LAST_GOOD = "last-good"
CHUNK_TOKENS = 1024
METRIC = "guard/chosen_logprob"


class WholeCheckpoints(TrainerCallback):
    """Marks each checkpoint that is whole: the trainer writes them in place, so a kill leaves a part of one."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        for path in folder.rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
        (folder / COMPLETE_FILE).touch()


def newest_checkpoint(folder: Path) -> Path | None:
    """Of those that are whole; parts of others are removed, because the trainer would write into them."""
    for path in folder.glob("checkpoint-*"):
        if not (path / COMPLETE_FILE).exists():
            shutil.rmtree(path)
    return max(folder.glob("checkpoint-*"), key=step_of, default=None)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


class Watch(TrainerCallback):
    """Logs every step, and stops the run when the chosen answers of `pairs` collapse under the trained adapter."""

    def __init__(self, guard: Guard, pairs: Sequence[Preference], *, folder: Path, resumed_step: int) -> None:
        self._guard, self._pairs, self._folder = guard, pairs, folder
        self._sink = JsonlSink(folder, resumed_step=resumed_step)
        """Cuts off what was logged after the checkpoint."""
        self._measured: dict[int, float] = {}
        self.baseline = 0.0
        self.num_tokens = self._tokens_before = last_tokens(folder)

    def close(self) -> None:
        self._sink.close()

    def on_train_begin(self, args: Any, state: Any, control: Any, *, model: Any = None, **kwargs: Any) -> None:
        path = self._folder / BASELINE_FILE
        found = read_object(path)
        if found is None:
            found = {METRIC: mean_logprob(model, self._pairs), "num_pairs": len(self._pairs)}
            write_atomically(path, f'{{"{METRIC}": {found[METRIC]}, "num_pairs": {len(self._pairs)}}}\n')
        self.baseline = found[METRIC]

    def on_step_end(self, args: Any, state: Any, control: Any, *, model: Any = None, **kwargs: Any) -> None:
        step = state.global_step
        if step % self._guard.interval and step != state.max_steps:
            return
        now = self._measured[step] = mean_logprob(model, self._pairs)
        if not now >= self.baseline - self._guard.max_drop:
            raise TrainingError(
                f"dpo: the chosen answers collapsed: their log-probability fell from {self.baseline:.3f} to {now:.3f} "
                f"nats a token by step {step}, further than dpo.guard.max_drop = {self._guard.max_drop:g}; lower "
                f"dpo.learning_rate, or raise dpo.losses.sft{self._kept()}"
            )
        save_adapter(model, self._folder / LAST_GOOD)

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        values = {name: value for name, value in (logs or {}).items() if isinstance(value, int | float)}
        if "loss" not in values:
            return
        self.num_tokens = values["num_tokens"] = self._tokens_before + int(values["num_tokens"])
        if values.get("grad_norm") == 0.0 and state.global_step == 1:  # later ones may have told all pairs apart
            raise TrainingError("dpo: the gradient is 0: nothing trains; see model.lora.target_modules")
        if not all(torch.tensor(values[name]).isfinite() for name in ("loss", "grad_norm") if name in values):
            raise TrainingError(f"dpo: loss {values['loss']} at step {state.global_step} is not finite{self._kept()}")
        measured = self._measured.pop(state.global_step, None)
        self._sink.log(state.global_step, values if measured is None else values | {METRIC: measured})

    def _kept(self) -> str:
        kept = self._folder / LAST_GOOD
        return f"; the last good adapter is {kept}" if kept.exists() else ""


def last_tokens(folder: Path) -> int:
    """Trained on up to the last step logged; the trainer counts from 0 again when it is resumed."""
    rows = read_lines(folder / METRICS_FILE)
    return int(rows[-1]["num_tokens"]) if rows else 0


def save_adapter(model: Any, path: Path) -> None:
    """The adapter that trains, whole or absent; an older one at `path` is replaced."""
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial, selected_adapters=["default"])
    shutil.rmtree(path, ignore_errors=True)
    partial.rename(path)


@torch.no_grad()
def mean_logprob(model: Any, pairs: Sequence[Preference]) -> float:
    """Mean log-probability of a token of the chosen answers, in nats, at temperature 1."""
    was_training, lm, total, count = model.training, causal_lm(model), 0.0, 0
    model.eval()
    for pair in pairs:
        ids = torch.tensor([*pair.prompt_ids, *pair.chosen_ids], device=lm.device)
        hidden = lm.get_decoder()(input_ids=ids[None, :-1], use_cache=False).last_hidden_state[0]
        first = len(pair.prompt_ids) - 1
        found, _ = token_logprobs(
            hidden[first:],
            lm.get_output_embeddings(),
            ids[first + 1 :],
            temperature=1.0,
            chunk=CHUNK_TOKENS,
            softcap=getattr(lm.config, "final_logit_softcapping", None),
        )
        total, count = total + found.sum().item(), count + len(pair.chosen_ids)
    model.train(was_training)
    return total / count
