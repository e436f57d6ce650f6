"""Phase 3: preferences from the rollouts of phase 2.

    python recipes/regime_w/build_preferences_abel.py

Reads `data/abel_regime_w_rollouts.jsonl` and writes `data/abel_coherence_preferences.jsonl`, the original's fields. A
question gives a few pairs that differ, not each right answer against each wrong one; `--all_pairs` gives those too.
Unlike the original's, nothing to write is an error, and so is a line that lacks a field.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from syncline.config.offline_collect import Pairs
from syncline.errors import ConfigError, SynclineError
from syncline.observe.files import write_atomically
from syncline.offline.lines import read_records
from syncline.offline.pairs import Pair, make_pairs, report
from syncline.offline.records import Trajectory

LINE = "=" * 80
FIELDS: Mapping[str, Any] = {
    "full_text": str,
    "answer": str,
    "num_tokens": int,
    "reward": (int, float),
    "correct": bool,
}
EVERYTHING = {"strategy": "all", "max_per_question": 10_000, "max_similarity": 1.0, "min_reward_gap": 0.01}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rollouts_path", type=Path, default=Path("data/abel_regime_w_rollouts.jsonl"))
    parser.add_argument("--out_path", type=Path, default=Path("data/abel_coherence_preferences.jsonl"))
    parser.add_argument("--all_pairs", action="store_true", help="as the original paired them")
    args = parser.parse_args()
    print(f"{LINE}\nAbel Coherence Preference Building\n{LINE}\n\nLoading rollouts from {args.rollouts_path}...")
    try:
        build(args)
    except SynclineError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


def build(args: argparse.Namespace) -> None:
    """The file has neither prompts nor tokens: answers to different arms meet, as they always did here."""
    asked = {"heldout_fraction": 0.0, "across_prompts": True, **(EVERYTHING if args.all_pairs else {})}
    solutions: dict[str, str] = {}
    found = make_pairs(_trajectories(args.rollouts_path, solutions), Pairs.model_validate(asked))
    write_atomically(args.out_path, "".join(json.dumps(_preference(pair, solutions)) + "\n" for pair in found.train))
    told = report(found)
    print(f"Loaded {len(solutions)} rollouts")
    for name, count in told["left_out"].items():
        print(f"  left out: {count} {name}")
    print(f"\n{LINE}\nPreference building complete!\nCorrectness pairs: {told['kinds'].get('correctness', 0)}")
    print(f"Coherence pairs: {told['kinds'].get('coherence', 0)}\nTotal pairs: {len(found.train)}")
    print(f"Saved preferences to: {args.out_path}\n{LINE}")


def _preference(pair: Pair, solutions: Mapping[str, str]) -> dict[str, Any]:
    return {
        "question": pair.chosen.question,
        "gold_answer": solutions[pair.chosen.question_id],
        "chosen": pair.chosen.text,
        "rejected": pair.rejected.text,
        "chosen_reward": pair.chosen.reward,
        "rejected_reward": pair.rejected.reward,
        "pair_type": pair.kind,
    }


def _trajectories(path: Path, solutions: dict[str, str]) -> Iterator[Trajectory]:
    """Fills `solutions`, by question. Raises `ConfigError` naming the line."""
    for where, row in read_records(path):
        for field, kind in (("question", str), ("gold_answer", str), ("trajectories", list)):
            _check(row, field, kind, where)
        question_id = hashlib.sha256(row["question"].encode()).hexdigest()[:12]
        if question_id in solutions:
            raise ConfigError([f"{where}: the question {row['question'][:60]!r} is there twice; remove one"])
        solutions[question_id] = row["gold_answer"]
        for number, own in enumerate(row["trajectories"]):
            for field, kind in FIELDS.items():
                _check(own, field, kind, f"{where}, trajectory {number}")
            yield _trajectory(row, own, question_id, number)


def _check(row: Mapping[str, Any], field: str, kind: Any, where: str) -> None:
    if field not in row:
        raise ConfigError([f"{where}: field {field!r} is missing; it has {', '.join(map(repr, row))}"])
    if not isinstance(row[field], kind):
        raise ConfigError([f"{where}: field {field!r} is {row[field]!r}, of the wrong type"])


def _trajectory(row: Mapping[str, Any], own: Mapping[str, Any], question_id: str, number: int) -> Trajectory:
    """Not checked as a whole: it has no tokens."""
    return Trajectory.model_construct(
        key=f"{question_id}/{number}",
        question_id=question_id,
        question=row["question"],
        gold=row["gold_answer"],
        arm=own.get("arm_name", ""),
        sample=number,
        prompt=(),
        text=own["full_text"],
        num_tokens=own["num_tokens"],
        finish_reason="stop",
        model="",
        answer=own["answer"],
        correct=own["correct"],
        scores={"reward": float(own["reward"])},
    )


if __name__ == "__main__":
    sys.exit(main())
