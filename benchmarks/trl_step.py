"""The step time of TRL 1.16's GRPOTrainer with vLLM colocated or as its server, to set beside `main_loop.py`'s.

    python benchmarks/trl_step.py --shape qwen2.5-0.5b --liger                       # one GPU
    CUDA_VISIBLE_DEVICES=1 trl vllm-serve --model FOLDER/qwen2.5-0.5b &              # two
    CUDA_VISIBLE_DEVICES=0 python benchmarks/trl_step.py --liger --server http://127.0.0.1:8000
    python benchmarks/trl_step.py --shape tiny --device cpu --groups 2 --max-tokens 8 --micro-batch 4   # without vLLM

256 completions of 512 tokens after prompts of 128, layers recomputed, sdpa. The first two steps are left out.
"""

import argparse
import random
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

from syncline.bench.engine import free_port
from syncline.bench.shapes import SHAPES, make_model

WARM_UP_STEPS = 2
ROWS = (("step", "step"), ("  sampling", "generate"), ("  sync", "sync_weights"))


class Clock:
    """Seconds of each call, by name."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, list[float]] = defaultdict(list)

    def timed(self, owner: Any, name: str) -> None:
        call: Callable[..., Any] = getattr(owner, name)

        def timed_call(*args: Any, **options: Any) -> Any:
            start = time.perf_counter()
            try:
                return call(*args, **options)
            finally:
                self.seconds[name].append(time.perf_counter() - start)

        setattr(owner, name, timed_call)


def trainer(args: argparse.Namespace, model: Path, clock: Clock) -> Any:
    from datasets import Dataset
    from datasets.table import InMemoryTable
    from transformers import TrainerCallback
    from trl.trainer.grpo_config import GRPOConfig  # pyright: ignore[reportMissingImports]
    from trl.trainer.grpo_trainer import GRPOTrainer  # pyright: ignore[reportMissingImports]

    class Ends(TrainerCallback):
        at = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            before, self.at = self.at, time.perf_counter()
            clock.seconds["step"].append(self.at - before)

    def even(completion_ids: list[list[int]], **_: Any) -> list[float | None]:
        return [sum(token % 2 == 0 for token in tokens) / max(1, len(tokens)) for tokens in completion_ids]

    letters = random.Random(0)
    texts = ["".join(chr(letters.randrange(97, 123)) for _ in range(args.prompt_tokens)) for _ in range(4096)]
    found = GRPOTrainer(
        model=str(model),
        reward_funcs=even,
        args=GRPOConfig(**settings(args)),
        train_dataset=Dataset(InMemoryTable.from_pydict({"prompt": texts}), fingerprint="prompts"),
        callbacks=[Ends()],
    )
    if found.use_vllm:
        for name in ("generate", "sync_weights"):
            clock.timed(found.vllm_generation, name)
    return found


def settings(args: argparse.Namespace) -> dict[str, Any]:
    on_gpu = args.device == "cuda"
    num_completions = args.groups * args.rollouts
    vllm: dict[str, Any] = {"use_vllm": on_gpu}
    if on_gpu:
        vllm |= {"vllm_mode": "server" if args.server else "colocate", "vllm_gpu_memory_utilization": 0.3}
        vllm |= {"vllm_max_model_length": args.prompt_tokens + args.max_tokens}
        if args.server:  # TRL's own port for the group is one for all
            vllm |= {"vllm_server_base_url": args.server, "vllm_group_port": free_port()}
        vllm |= {"generation_kwargs": {"ignore_eos": True}}
    return vllm | {
        "output_dir": tempfile.mkdtemp(prefix="trl-"),
        "model_init_kwargs": {"dtype": "bfloat16" if on_gpu else "float32", "attn_implementation": "sdpa"},
        "per_device_train_batch_size": args.micro_batch,
        "gradient_accumulation_steps": num_completions // args.micro_batch,
        "num_generations": args.rollouts,
        "max_completion_length": args.max_tokens,
        "max_steps": args.steps,
        "learning_rate": 1e-6,
        "beta": 0.0,
        "temperature": 1.0,
        "bf16": on_gpu,
        "use_cpu": not on_gpu,
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "use_liger_kernel": args.liger,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def main() -> int:
    args = _arguments()
    model = args.folder / args.shape
    if not (model / "config.json").exists():
        make_model(args.shape, model, max_length=4096)
    clock = Clock()
    training = trainer(args, model, clock)
    training.train()
    means = {name: mean(each[WARM_UP_STEPS:]) for name, each in clock.seconds.items() if each[WARM_UP_STEPS:]}
    means["learning"] = means["step"] - means.get("generate", 0.0) - means.get("sync_weights", 0.0)
    way = "without vLLM" if args.device == "cpu" else "server" if args.server else "colocate"
    print(f"\nTRL, {way}{', liger' * args.liger}, {args.shape}, {args.groups} x {args.rollouts} completions of "
          f"{args.max_tokens} tokens, mean of {len(clock.seconds['step']) - WARM_UP_STEPS} steps")  # fmt: skip
    for title, name in (*ROWS, ("  learning", "learning")):
        print(f"{title:<24}{means.get(name, float('nan')):9.3f} s")
    rewards = [line["reward"] for line in training.state.log_history if "reward" in line]
    print(f"{'reward':<24}{rewards[0]:9.3f} -> {rewards[-1]:.3f}")
    if args.device == "cuda":
        import torch

        print(f"{'peak of this process':<24}{torch.cuda.max_memory_allocated() / 1e9:9.1f} GB")
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="qwen2.5-0.5b")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--server", metavar="URL", help="of `trl vllm-serve` on another GPU; absent: colocated")
    parser.add_argument("--liger", action="store_true")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--groups", type=int, default=32)
    parser.add_argument("--rollouts", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--max-tokens", type=int, default=512)
    parser.add_argument("--micro-batch", type=int, default=16)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "syncline-trl-step")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    return args


if __name__ == "__main__":
    sys.exit(main())
