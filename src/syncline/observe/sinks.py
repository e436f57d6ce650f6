"""Where a step's metrics and sample rollouts go: lines of JSON in the run's folder.

One writer (the learner) appends and flushes; anybody may follow the file. A learner that resumes from step N first
cuts the lines of later steps off, with one `truncate`, so no step is in the file twice and a reader never sees a
half-cut file.
"""

import json
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from syncline.observe.tokens import Decode, tokens_for_people
from syncline.protocols import MetricSink
from syncline.types import Message, Rollout, RolloutGroup

METRICS_FILE = "metrics.jsonl"
ROLLOUTS_FILE = "rollouts.jsonl"


class JsonlSink:
    """`metrics.jsonl` gets a line a step, `{"step": 3, "time": 1.7e9, "reward": 0.5}`; `rollouts.jsonl` one a group.

    A metric that is not finite is written as `null`: JSON has no NaN. Steps must grow; a `ValueError` otherwise.
    """

    def __init__(
        self,
        folder: Path,
        *,
        resumed_step: int,
        num_groups: int = 2,
        decode: Decode | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`resumed_step` is the last step a checkpoint holds, 0 for a new run; `num_groups` are kept of each step, with
        their attempts' tokens where `decode` says what these mean."""
        folder.mkdir(parents=True, exist_ok=True)
        self._step = resumed_step
        self._num_groups = num_groups
        self._decode = decode
        self._clock = clock
        self._metrics = _open_after_cut(folder / METRICS_FILE, resumed_step)
        self._rollouts = _open_after_cut(folder / ROLLOUTS_FILE, resumed_step)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        if step <= self._step:
            raise ValueError(f"step {step} is logged after step {self._step}; steps must grow")
        self._step = step
        _write_lines(self._metrics, [{"step": step, "time": self._clock(), **_finite(metrics)}])

    def log_rollouts(
        self, step: int, groups: Iterable[RolloutGroup], advantages: Mapping[str, Sequence[float]]
    ) -> None:
        kept = [group for _, group in zip(range(self._num_groups), groups, strict=False)]
        lines = [{"step": step} | self._told(group, advantages[group.group_id]) for group in kept]
        _write_lines(self._rollouts, lines)

    def _told(self, group: RolloutGroup, advantages: Sequence[float]) -> dict[str, Any]:
        told = group_for_people(group, advantages)
        for rollout, line in zip(group.rollouts, told["rollouts"], strict=True):
            if self._decode is not None and rollout.samples:
                line["tokens"] = tokens_for_people(rollout.samples[-1], self._decode)
        return told

    def close(self) -> None:
        self._metrics.close()
        self._rollouts.close()


class MultiSink:
    """Hands everything to several sinks, in order."""

    def __init__(self, sinks: Sequence[MetricSink]) -> None:
        self._sinks = tuple(sinks)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for sink in self._sinks:
            sink.log(step, metrics)

    def log_rollouts(
        self, step: int, groups: Iterable[RolloutGroup], advantages: Mapping[str, Sequence[float]]
    ) -> None:
        groups = tuple(groups)
        for sink in self._sinks:
            sink.log_rollouts(step, groups, advantages)

    def close(self) -> None:
        for sink in self._sinks:
            sink.close()


def group_for_people(group: RolloutGroup, advantages: Sequence[float]) -> dict[str, Any]:
    """What a person wants to see of a group: the prompt once, then each attempt, with one advantage a rollout."""
    messages = max((rollout.messages for rollout in group.rollouts), key=len)
    prompt = messages[: _num_given(messages)]
    return {
        "group_id": group.group_id,
        "environment": group.environment,
        "task_index": group.task_index,
        "prompt": [
            {"role": m.role, "content": m.content} | ({"images": [i.path for i in m.images]} if m.images else {})
            for m in prompt
        ],
        "rollouts": [
            _rollout_for_people(rollout, advantage)
            for rollout, advantage in zip(group.rollouts, advantages, strict=True)
        ],
    }


def _rollout_for_people(rollout: Rollout, advantage: float) -> dict[str, Any]:
    return {
        "completion": _said(rollout.messages[_num_given(rollout.messages) :]),
        "reward": rollout.reward,
        "advantage": advantage if math.isfinite(advantage) else None,
        "status": rollout.status.value,
        "reward_parts": dict(rollout.reward_parts),
        "num_tokens": sum(sample.num_sampled for sample in rollout.samples),
        "versions": sorted({v.policy_version for sample in rollout.samples for v in sample.versions}),
        "error": rollout.error,
    }


def _num_given(messages: Sequence[Message]) -> int:
    """Messages before the model's first."""
    return next((i for i, message in enumerate(messages) if message.role == "assistant"), len(messages))


def _said(messages: Sequence[Message]) -> str | None:
    """An attempt as one text; the speakers are named where there is more than one turn."""
    if len(messages) < 2:
        return messages[0].content if messages else None
    return "\n\n".join(f"[{message.role}]\n{message.content}" for message in messages)


def _finite(metrics: Mapping[str, float]) -> dict[str, float | None]:
    return {name: float(value) if math.isfinite(value) else None for name, value in metrics.items()}


def _write_lines(file: Any, lines: Iterable[Mapping[str, Any]]) -> None:
    file.write("".join(json.dumps(line, allow_nan=False) + "\n" for line in lines))
    file.flush()


def _open_after_cut(path: Path, resumed_step: int) -> Any:
    """The file, open for appending, without lines after `resumed_step` and without a line cut short by a crash."""
    if path.exists() and (keep := _kept_bytes(path, resumed_step)) < path.stat().st_size:
        os.truncate(path, keep)
    return path.open("a", encoding="utf-8")


def _kept_bytes(path: Path, resumed_step: int) -> int:
    keep = 0
    with path.open("rb") as file:
        for line in file:
            if not line.endswith(b"\n") or json.loads(line)["step"] > resumed_step:
                break
            keep += len(line)
    return keep
