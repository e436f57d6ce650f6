"""Phase 2: rollouts of the merged (or, with `--lora_path`, of the unmerged) SFT model by Regime W's arms.

    python recipes/regime_w/collect_rollouts_abel_vllm.py --model_path checkpoints/abel_sft_merged \\
        --data_path data/gsm8k_train.jsonl --out_path data/abel_regime_w_rollouts.jsonl --n_samples 500

WORLD_SIZE GPUs (default: all there are) each run a replica, and every completion is asked for at once; with
`--tensor_parallel_size` that many share one. What is sampled is on disk at once, in `<out_path>.work`: killed, the same
command goes on. The file has the original's fields; `num_tokens` counts tokens, where the original counted words.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from syncline.cli.collect import collect_stage, engines
from syncline.config.load import validated
from syncline.config.offline import OfflineConfig
from syncline.errors import ConfigError, SynclineError
from syncline.launch.plan import Machine
from syncline.observe.files import write_atomically
from syncline.offline.answers import ANSWER_RULES
from syncline.offline.arms import arms_of
from syncline.offline.collect import ROLLOUTS_FILE
from syncline.offline.questions import load_questions
from syncline.offline.records import Trajectory, read_trajectories

LINE = "=" * 80
EVERY = 20


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_path", default="checkpoints/abel_sft_merged")
    parser.add_argument("--lora_path", help="served over --model_path as it is")
    parser.add_argument("--data_path", default="data/gsm8k_train.jsonl")
    parser.add_argument("--out_path", type=Path, default=Path("data/abel_regime_w_rollouts.jsonl"))
    parser.add_argument("--n_samples", type=int, default=500, help="questions, the first of the file; 0: all")
    parser.add_argument("--version", choices=("v8", "v11"), default="v8", help="8 or 11 arms, and their scores")
    parser.add_argument("--max_tokens", type=int, default=512)
    parser.add_argument("--max_model_len", type=int, default=2048)
    parser.add_argument("--tensor_parallel_size", type=int, default=1)
    parser.add_argument("--engine_url", action="append", default=[], help="running engines; default: they are started")
    args = parser.parse_args()
    try:
        collect(args)
    except SynclineError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


def collect(args: argparse.Namespace) -> None:
    world = int(os.environ.get("WORLD_SIZE") or max(1, len(Machine.here().gpus)))
    print(f"{LINE}\nAbel Regime W Rollout Collection (vLLM Optimized)\n{LINE}\n\nConfiguration:")
    print(f"  Merged model: {args.model_path}\n  Data path: {args.data_path}\n  Output path: {args.out_path}")
    print(f"  N samples: {args.n_samples}\n  World size (GPUs): {world}\n")
    print(f"Loading GSM8K training data from {args.data_path}...")
    config = _config(args, world)
    questions = load_questions(config.collect.questions, seed=0, heldout=False).questions
    arms = arms_of(args.version, prompt="{question}")
    print(f"Using {len(questions)} examples for Regime W rollout collection\n")
    print(f"Built {len(arms)} Regime W arms (Wolfram + Maudlin styles)")
    print("Initializing vLLM engine with tensor parallelism...")
    replicas = config.engine.num_replicas
    print(f"  ({replicas} replicas of tensor-parallel size {args.tensor_parallel_size})\n", flush=True)
    with engines(config, args.engine_url) as urls:
        print("vLLM engine initialized successfully!\nStarting rollout collection...")
        print(f"Generating {len(arms)} trajectories per question\n", flush=True)
        done = collect_stage(config, lambda: urls, given=bool(args.engine_url))
    solutions = {question.question_id: question.solution for question in questions}
    lines = list(_lines(done.folder / ROLLOUTS_FILE, solutions, args.version))
    print(f"\nWriting rollouts to {args.out_path}...")
    write_atomically(args.out_path, "".join(lines))
    print(f"\n{LINE}\nRollout collection complete!\nSaved Abel Regime W rollouts to: {args.out_path}")
    print(f"Total rollouts: {len(lines)}\nTrajectories per rollout: {len(arms)}\n{LINE}")


def _config(args: argparse.Namespace, world: int) -> OfflineConfig:
    values: dict[str, Any] = {
        "run": {"dir": f"{args.out_path}.work"},
        "model": {
            "path": args.model_path,
            "max_length": args.max_model_len,
            "lora": {"rank": _rank(Path(args.lora_path)) if args.lora_path else 16},
        },
        "engine": {
            "num_replicas": max(1, world // args.tensor_parallel_size),
            "tensor_parallel_size": args.tensor_parallel_size,
            "devices": list(range(world)),
            "gpu_memory_utilization": 0.9,
            "max_num_seqs": 256,
        },
        "bridge": {"name": "lora" if args.lora_path else "restart"},
        "collect": {
            "questions": {"path": args.data_path, "num_questions": args.n_samples or None},
            "coherence": args.version,
            "max_tokens": args.max_tokens,
            "adapter": args.lora_path,
        },
        "eval": {"sets": [{"made": {}}], "max_tokens": args.max_tokens},
    }
    return validated(OfflineConfig, values)


def _rank(adapter: Path) -> int:
    try:
        return json.loads((adapter / "adapter_config.json").read_text())["r"]
    except OSError as error:
        raise ConfigError([f"--lora_path: {adapter} is no PEFT folder ({error.strerror})"]) from error


def _lines(path: Path, solutions: Mapping[str, str], version: str) -> Iterator[str]:
    """One a question, as the original wrote it."""
    by_question = groupby(read_trajectories(path, Trajectory), key=lambda one: one.question_id)
    for number, (question_id, group) in enumerate(by_question, start=1):
        yield json.dumps(_rollout(list(group), solutions[question_id], version)) + "\n"
        if number % EVERY == 0 or number == len(solutions):
            print(f"  Collected {number}/{len(solutions)} rollouts")


def _rollout(own: Sequence[Trajectory], solution: str, version: str) -> dict[str, Any]:
    extract = ANSWER_RULES[version].extract
    return {
        "question": own[0].question,
        "gold_answer": solution,
        "trajectories": [
            {
                "full_text": one.text,
                "answer": extract(one.text),
                "reasoning": one.text,
                "num_tokens": one.num_tokens,
                "reward": one.reward,
                "correct": one.correct,
                "arm_name": one.arm,
            }
            for one in own
        ],
    }


if __name__ == "__main__":
    sys.exit(main())
