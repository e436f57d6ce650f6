"""`training.log`, as TRL's scripts leave it, and a CSV of completions: for people and programs that read those.

The log gets everything this process logs, in the same format, from the start of the sink to its end; a resumed run
appends. Metrics have TRL's names already; `num_tokens` is added up here, as TRL does.
"""

import csv
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from syncline.config.schema import RunConfig
from syncline.observe.files import read_lines
from syncline.observe.logs import FORMAT
from syncline.observe.sinks import METRICS_FILE
from syncline.types import RolloutGroup

TRAINING_LOG = "training.log"
NAME = "train_grpo_vllm"
COLUMNS = ("step", "micro_step", "prompt", "completion", "reward", "parts")
log = logging.getLogger(NAME)


class TrainingLog:
    """A `MetricSink`; see the module. `engine_urls` are those the rollouts come from."""

    def __init__(self, config: RunConfig, engine_urls: Sequence[str]) -> None:
        self._folder = Path(config.run.dir)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._num_tokens: float | None = None
        self._handler = logging.FileHandler(self._folder / TRAINING_LOG, encoding="utf-8")
        self._handler.setFormatter(logging.Formatter(FORMAT))
        logging.getLogger().addHandler(self._handler)
        for line in opening_lines(config, engine_urls):
            log.info(line)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        if self._num_tokens is None:  # of a resumed run: what was sampled before, as far as it was kept
            before = [row for row in read_lines(self._folder / METRICS_FILE) if row["step"] < step]
            self._num_tokens = float(sum(row.get("tokens/sampled") or 0.0 for row in before))
        self._num_tokens += metrics.get("tokens/sampled", 0.0)
        shown = dict(metrics) | {"num_tokens": self._num_tokens, "step": step}
        log.info("{%s}", ", ".join(f"'{name}': {value:.6g}" for name, value in shown.items()))

    def log_rollouts(
        self, step: int, groups: Iterable[RolloutGroup], advantages: Mapping[str, Sequence[float]]
    ) -> None:
        """Completions are in `rollouts.jsonl`, and in the CSV."""

    def close(self) -> None:
        log.info("Training artifacts saved to %s", self._folder / "checkpoints")
        logging.getLogger().removeHandler(self._handler)
        self._handler.close()


def opening_lines(config: RunConfig, engine_urls: Sequence[str]) -> list[str]:
    """What is about to be done, in the words of TRL's scripts; micro-batches are cut by tokens, not by rows."""
    run, budget = config.run, f"token_budget {config.learner.token_budget}"
    completions = run.groups_per_step * run.rollouts_per_group
    mode = "colocate" if config.bridge.name == "shared" else "server"
    stream = {
        "prompts_per_step": run.groups_per_step,
        "num_generations": run.rollouts_per_group,
        "environments": ",".join(own.name or own.task for own in config.environments),
    }
    generation = {
        "num_generations": run.rollouts_per_group,
        "generation_batch_size": completions,
        "per_device_train_batch_size": budget,
        "grad_accum": "as many micro-batches as the step's tokens need",
        "split_batches": False,
        "completions_per_micro_step": budget,
        "completions_per_update": completions,
        "vllm_base_url": ",".join(engine_urls),
    }
    start = {"total_steps": run.num_steps, "output_dir": run.dir}
    return [
        f"StepStream configured | {_joined(stream)}",
        f"Generation config | use_vllm=True, vllm_mode={mode} | {_joined(generation)}",
        f"Starting training | {_joined(start)}",
    ]


def _joined(values: Mapping[str, object]) -> str:
    return " | ".join(f"{name}={value}" for name, value in values.items())


class CompletionsCsv:
    """A `MetricSink` that writes a row for each completion; `parts` are the reward's, `action=2 target_action=1`. Of a
    resumed run the rows after `resumed_step`, and one that a kill has torn, are cut off."""

    def __init__(self, path: Path, *, resumed_step: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            os.truncate(path, _kept_bytes(path, resumed_step))
        is_new = not path.exists() or not path.stat().st_size
        self._file = path.open("a", newline="", encoding="utf-8")
        self._rows = csv.writer(self._file)
        if is_new:
            self._rows.writerow(COLUMNS)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Metrics are in `metrics.jsonl`."""

    def log_rollouts(
        self, step: int, groups: Iterable[RolloutGroup], advantages: Mapping[str, Sequence[float]]
    ) -> None:
        for micro_step, group in enumerate(groups):
            for rollout in group.rollouts:
                said = [message.content for message in rollout.messages]
                parts = " ".join(f"{name}={value:g}" for name, value in rollout.reward_parts.items())
                self._rows.writerow(
                    [step, micro_step, "".join(said[:-1]), said[-1] if said else "", rollout.reward, parts]
                )
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _kept_bytes(path: Path, resumed_step: int) -> int:
    """Up to the last row of a step that was kept: an earlier run's rows may stand before, of later steps too. A row
    ends at the first newline that is in no quotes."""
    keep, end, row = 0, 0, b""
    with path.open("rb") as file:
        for line in file:
            row += line
            if not line.endswith(b"\n") or row.count(b'"') % 2:
                continue
            step, end = row.partition(b",")[0], end + len(row)
            if resumed_step == 0 or not step.isdigit() or int(step) <= resumed_step:
                keep = end
            row = b""
    return keep
