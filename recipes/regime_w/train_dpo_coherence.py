"""Phase 4: DPO of the SFT adapter on the preferences of phase 3.

    python recipes/regime_w/train_dpo_coherence.py          (or: accelerate launch --num_processes 1 …)

Reads `data/abel_coherence_preferences.jsonl`, starts from `checkpoints/abel_sft_lora`, which is the reference too, and
writes `checkpoints/abel_coherence_lora`, as the original did with its learning rate, epoch and batch. What differs: the
adapter trains, β and lengths are said, the loss has the likelihood of the chosen answer in it (`--loss sigmoid` leaves
it out), a collapse stops the run, and a killed one goes on.
"""

import argparse
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from syncline.config.offline import Dpo
from syncline.config.schema import Lora, Model
from syncline.errors import ConfigError, SynclineError
from syncline.observe.files import write_atomically
from syncline.offline.dpo import ADAPTER, Task, train_dpo
from syncline.offline.lines import read_records
from syncline.offline.stage import Stage, file_digest, run_stage, weights_digest

LINE = "=" * 80
PROMPT = (
    "You are a careful math tutor. Solve the problem step-by-step, then give the final answer in the format '#### 42'."
    "\n\nProblem:\n{question}\n\nSolution:\n"
)
FIELDS = ("question", "chosen", "rejected")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base_model", default="GAIR/Abel-7B-002")
    parser.add_argument("--sft_path", type=Path, default=Path("checkpoints/abel_sft_lora"))
    parser.add_argument("--data_path", type=Path, default=Path("data/abel_coherence_preferences.jsonl"))
    parser.add_argument("--out_path", type=Path, default=Path("checkpoints/abel_coherence_lora"))
    parser.add_argument("--learning_rate", type=float, default=5e-6)
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--loss", choices=("sigmoid+sft", "sigmoid"), default="sigmoid+sft")
    parser.add_argument("--max_length", type=int, default=1024)
    args = parser.parse_args()
    print(f"{LINE}\nAbel Coherence DPO Training\n{LINE}\n\nConfiguration:")
    for label, value in (
        ("Base model", args.base_model),
        ("SFT adapter", args.sft_path),
        ("Data path", args.data_path),
    ):
        print(f"  {label}: {value}")
    print(f"  Output path: {args.out_path}\n", flush=True)
    if (world_size := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        print(f"WORLD_SIZE: {world_size}, and an adapter is trained on one device; start it on one", file=sys.stderr)
        return 2
    try:
        facts = train(args)
    except SynclineError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(f"\n{LINE}\nDPO training complete!\nSaved DPO adapter to: {args.out_path}")
    print(f"Pairs: {facts['num_pairs']}\nOptimizer steps: {facts['num_steps']}\n{LINE}")
    return 0


def train(args: argparse.Namespace) -> Any:
    work = args.out_path.with_name(f"{args.out_path.name}.stages")
    pairs = write_atomically(work / "pairs.jsonl", "".join(json.dumps(one) + "\n" for one in converted(args.data_path)))
    config = Dpo(
        learning_rate=args.learning_rate,
        num_epochs=args.epochs,
        beta=args.beta,
        losses=dict.fromkeys(args.loss.split("+"), 1.0),
        microbatch_pairs=2,
    )
    lora = Lora(target_modules=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"))
    model = Model(path=args.base_model, max_length=args.max_length, lora=lora)
    task = Task(model, pairs, start=args.sft_path, seed=42)
    known = config.model_dump(mode="json") | {"model": args.base_model, "max_length": args.max_length}
    stage = Stage("dpo", known, {"pairs": file_digest(pairs), "start": weights_digest(args.sft_path)})
    done = run_stage(work, stage, lambda notes: train_dpo(config, task, notes), outputs=(ADAPTER,))
    shutil.copytree(done.folder / ADAPTER, args.out_path, dirs_exist_ok=True)
    return done.facts


def converted(path: Path) -> list[dict[str, Any]]:
    """The original's records, one prompt for all as it had, in TRL's conversational format."""
    found = []
    for where, record in read_records(path):
        if missing := [field for field in FIELDS if not isinstance(record.get(field), str)]:
            raise ConfigError([f"{where}: field {missing[0]!r} is missing; phase 3 writes {', '.join(FIELDS)}"])
        answers = {field: [{"role": "assistant", "content": record[field]}] for field in ("chosen", "rejected")}
        prompt = PROMPT.replace("{question}", record["question"])
        found.append({"prompt": [{"role": "user", "content": prompt}], **answers})
    return found


if __name__ == "__main__":
    sys.exit(main())
