"""The demo's task learned by TRL 1.16's GRPOTrainer and by syncline: the reward must not depend on who trains.

    python benchmarks/demo_trl.py --seeds 0 1 2

The same base model, tasks, group sizes, loss, rates and number of steps; TRL samples with transformers, syncline with
vLLM over `bridge.name: shared`. Rewards are means of the first and last five steps, held-out answers are sampled at
temperature 1. Seconds are not compared: what a step costs is for `main_loop.py` and `trl_step.py` to say.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from queue import SimpleQueue
from statistics import mean
from typing import Any

import demo_bridges
import torch
import yaml

from syncline.envs.tasks.arithmetic import Arithmetic

ROOT = Path(__file__).resolve().parents[1]
ENDS = 5
COLUMNS = ("reward_first", "reward_last", "heldout_before", "heldout_after")


def main() -> int:
    args = _arguments()
    sys.path.insert(0, str(ROOT / "recipes" / "demo"))
    from base_model import build_base_model

    base = build_base_model(ROOT / "runs" / "base")
    print(f"{'':20}" + "".join(f"{column:>16}" for column in COLUMNS), flush=True)
    failed = 0
    for seed in args.seeds:
        for name, run in (("TRL", _trl), ("syncline", _syncline)):
            done = run(base, seed, args)
            cells = [f"{done[column]:16.2f}" for column in COLUMNS] if done else ["   failed: see its log"]
            print(f"{name + f', seed {seed}':20}" + "".join(cells), flush=True)
            failed += not done
    return min(1, failed)


def _syncline(base: Path, seed: int, args: argparse.Namespace) -> dict[str, float] | None:
    places: SimpleQueue[str] = SimpleQueue()
    places.put("")
    folder = args.out / f"syncline-{seed}"
    code = demo_bridges.run("shared", folder, base, seed, places, [f"run.num_steps={args.steps}"])
    return None if code else dict(demo_bridges.summary(folder))


def _trl(base: Path, seed: int, args: argparse.Namespace) -> dict[str, float]:
    from datasets import Dataset
    from datasets.table import InMemoryTable
    from trl.trainer.grpo_config import GRPOConfig  # pyright: ignore[reportMissingImports]
    from trl.trainer.grpo_trainer import GRPOTrainer  # pyright: ignore[reportMissingImports]

    demo = yaml.safe_load((ROOT / "configs" / "demo.yaml").read_text())
    arithmetic = Arithmetic(seed=seed, **demo["environments"][0]["args"])
    tasks = [arithmetic.task(i) for i in range(args.steps * demo["run"]["groups_per_step"])]
    prompts = [_prompt(arithmetic, task) for task in tasks]

    def correct(completions: list[str], index: list[int], **_: Any) -> list[float | None]:
        return [arithmetic.score(tasks[i], text).reward for i, text in zip(index, completions, strict=True)]

    trainer = GRPOTrainer(
        model=str(base),
        reward_funcs=correct,
        args=GRPOConfig(**_settings(demo, seed, args.steps)),
        train_dataset=Dataset(
            InMemoryTable.from_pydict({"prompt": prompts, "index": list(range(len(tasks)))}), fingerprint=f"sums-{seed}"
        ),
    )
    before = _heldout(trainer, arithmetic, demo)
    trainer.train()
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    found = (mean(rewards[:ENDS]), mean(rewards[-ENDS:]), before, _heldout(trainer, arithmetic, demo))
    return dict(zip(COLUMNS, found, strict=True))


def _settings(demo: dict[str, Any], seed: int, steps: int) -> dict[str, Any]:
    """The demo's, and syncline's own where the demo leaves them out."""
    completions = demo["run"]["groups_per_step"] * demo["run"]["rollouts_per_group"]
    optimizer = demo["learner"]["optimizer"]
    return {
        "output_dir": tempfile.mkdtemp(prefix="trl-"),
        "model_init_kwargs": {"dtype": "float32"},
        "per_device_train_batch_size": completions,
        "num_generations": demo["run"]["rollouts_per_group"],
        "max_completion_length": demo["sampling"]["max_tokens"],
        "max_steps": steps,
        "learning_rate": float(optimizer["learning_rate"]),
        "warmup_steps": optimizer["num_warmup_steps"],
        "lr_scheduler_type": "cosine",
        "adam_beta2": 0.95,
        "max_grad_norm": 1.0,
        "loss_type": "grpo",
        "beta": 0.0,
        "temperature": 1.0,
        "seed": seed,
        "use_cpu": not torch.cuda.is_available(),
        "bf16": False,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


@torch.no_grad()
def _heldout(trainer: Any, arithmetic: Arithmetic, demo: dict[str, Any]) -> float:
    """The share of right answers to tasks that nobody trains on, one sampled at temperature 1 for each."""
    tokenizer, model = trainer.processing_class, trainer.model
    tasks = [arithmetic.task(i, split="heldout") for i in range(demo["evaluation"]["num_tasks"])]
    prompts = [_prompt(arithmetic, task) for task in tasks]
    batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    model.eval()
    sampled = model.generate(
        **batch.to(model.device),
        do_sample=True,
        temperature=1.0,
        top_k=0,
        max_new_tokens=demo["sampling"]["max_tokens"],
    )
    model.train()
    texts = tokenizer.batch_decode(sampled[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return mean(arithmetic.score(task, text).reward for task, text in zip(tasks, texts, strict=True))


def _prompt(arithmetic: Arithmetic, task: Any) -> str:
    """The demo's model has no chat template: a conversation is its text."""
    [message] = arithmetic.prompt(task)
    return str(message.content)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="The demo's task, trained by TRL and by syncline.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "trl")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
