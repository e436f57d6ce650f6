"""Trajectories as `collect` writes them, made by hand."""

import hashlib
from typing import Any

from syncline.offline.records import Trajectory


def trajectory(
    *, sample: int, text: str, correct: bool = False, question: str = "7?", arm: str = "solve", **fields: Any
) -> Trajectory:
    """One token a character; the reward is 1 or 0 unless given."""
    question_id = hashlib.sha256(question.encode()).hexdigest()[:12]
    prompt = fields.pop("prompt", question)
    values = {
        "key": f"{question_id}/{arm}/{sample}",
        "question_id": question_id,
        "question": question,
        "gold": "7",
        "arm": arm,
        "sample": sample,
        "seed": sample,
        "prompt": [{"role": "user", "content": prompt}],
        "text": text,
        "token_ids": list(map(ord, text)),
        "logprobs": [-0.5] * len(text),
        "num_tokens": len(text),
        "num_prompt_tokens": len(prompt),
        "finish_reason": "stop",
        "model": "model-a",
        "answer": "7" if correct else "8",
        "correct": correct,
        "scores": {"reward": float(correct)},
    }
    return Trajectory.model_validate(values | fields)
