"""Phase 5: greedy accuracy on GSM8K Platinum, by vLLM.

    python recipes/regime_w/eval_abel_coherence_platinum.py

Evaluates `checkpoints/abel_coherence_lora` on `data/gsm8k_platinum_test.jsonl` and writes
`outputs/abel_coherence_platinum_eval.jsonl`, the original's fields, and beside it `….summary.json` with the digest of
the weights, intervals and rates. Unlike the original's, the file is written anew whenever the weights are others.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from syncline.cli.assess import assess_stage, told
from syncline.cli.policies import Policies
from syncline.config.load import validated
from syncline.config.offline import OfflineConfig
from syncline.errors import SynclineError
from syncline.learner.model import assets_folder
from syncline.observe.files import write_atomically
from syncline.offline.answers import ANSWER_RULES
from syncline.offline.assess import read_marks
from syncline.offline.engines import running_engines

LINE = "=" * 80
PROMPT = (
    "You are a careful math tutor. Solve the problem step-by-step, then give the final answer in the format '#### 42'."
    "\n\nProblem:\n{question}\n\nSolution:\n"
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base_model", default="GAIR/Abel-7B-002")
    parser.add_argument("--lora_path", type=Path, default=Path("checkpoints/abel_coherence_lora"))
    parser.add_argument("--data_path", default="data/gsm8k_platinum_test.jsonl")
    parser.add_argument("--out_path", type=Path, default=Path("outputs/abel_coherence_platinum_eval.jsonl"))
    parser.add_argument("--max_new_tokens", type=int, default=256)
    parser.add_argument("--max_length", type=int, default=1280)
    parser.add_argument("--lora_rank", type=int, default=16)
    parser.add_argument("--engine_url", action="append", default=[], help="running engines; default: one is started")
    args = parser.parse_args()
    print(f"{LINE}\nAbel Coherence Evaluation (GSM8K Platinum)\n{LINE}\n\nConfiguration:")
    print(f"  Base model: {args.base_model}\n  LoRA adapter: {args.lora_path}\n  Data path: {args.data_path}")
    print(f"  Output path: {args.out_path}\n", flush=True)
    try:
        summary = evaluate(args)
    except SynclineError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print("\n".join(told(summary["sets"])))
    own = summary["sets"]["platinum"]
    right = round(own["greedy"]["accuracy"] * own["num_questions"])
    print(f"\n{LINE}\nEvaluation complete!\nAccuracy: {right}/{own['num_questions']}")
    print(f"Saved to: {args.out_path}\n{LINE}")
    return 0


def evaluate(args: argparse.Namespace) -> dict[str, Any]:
    config = validated(OfflineConfig, values(args))
    path = assets_folder(args.base_model)
    with Policies(config, path, given=tuple(args.engine_url), start=running_engines) as policies:
        done = assess_stage(config, policies, args.lora_path, version=1)
    rule = ANSWER_RULES["v8"]
    lines = []
    for index, one in enumerate(read_marks(config.eval, done.folder, config.eval.sets[0], seed=0)):
        row = {
            "index": index,
            "question": one.question,
            "gold_answer_raw": one.solution,
            "gold_answer_extracted": rule.extract(one.solution),
            "gold_answer_normalized": rule.answer(one.solution),
            "model_output": one.text,
            "pred_answer_extracted": rule.extract(one.text),
            "pred_answer_normalized": rule.answer(one.text),
            "correct": one.is_correct,
        }
        lines.append(json.dumps(row) + "\n")
    summary = {"model": done.facts["model"], "sets": done.facts["sets"]}
    write_atomically(args.out_path, "".join(lines))
    write_atomically(args.out_path.with_suffix(".summary.json"), json.dumps(summary, indent=2) + "\n")
    return summary


def values(args: argparse.Namespace) -> dict[str, Any]:
    """As a pipeline file; nothing is collected here."""
    rows = {"name": "platinum", "path": args.data_path}
    return {
        "run": {"dir": str(args.out_path.with_suffix(".stages"))},
        "model": {"path": args.base_model, "max_length": args.max_length, "lora": {"rank": args.lora_rank}},
        "collect": {"questions": rows, "max_tokens": args.max_new_tokens},
        "eval": {
            "sets": [rows],
            "prompt": PROMPT,
            "answers": "v8",
            "format": "####",
            "max_tokens": args.max_new_tokens,
        },
    }


if __name__ == "__main__":
    sys.exit(main())
