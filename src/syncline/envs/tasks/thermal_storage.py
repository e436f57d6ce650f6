"""Rows whose every possible action has a reward of its own: the agent that runs a thermal storage plant.

A row has a `prompt`, already in the model's chat format (Harmony), and `q_action_0..3` and `reward_action_0..3`; the
action is the last `[digit]` of the completion, whichever channel it is in. The files are CSV or JSON lines; of a
folder, all its `*_harmony.csv`, one after the other.
"""

import csv
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from syncline.envs.conversation import Conversation, converse
from syncline.envs.rendering import RENDERED
from syncline.envs.rows import Rows, Source, file_rows
from syncline.envs.scoring import Score
from syncline.errors import ConfigError
from syncline.protocols import Policy
from syncline.types import FinishReason, Message, Rollout

NUM_ACTIONS = 4
TO_ANSWER = "<|start|>assistant"
_ACTION = re.compile(r"\[(\d)\]")


@dataclass(frozen=True, slots=True)
class Decision:
    """One step of the plant: `rewards` and `values` (q) by action."""

    prompt: str
    rewards: tuple[float, ...]
    values: tuple[float, ...]

    @property
    def target(self) -> int:
        return max(range(NUM_ACTIONS), key=self.values.__getitem__)


class ThermalStorage:
    """`invalid_reward` is what a completion without an action, or one that was cut off, earns; `None` leaves it out of
    the training. Held-out rows come from `heldout_path`."""

    name = "thermal_storage"

    def __init__(
        self, *, path: str, heldout_path: str | None = None, invalid_reward: float | None = None, seed: int = 0
    ) -> None:
        self._invalid_reward = invalid_reward
        heldout = heldout_path or path
        self._rows = Rows(
            _source(path), lambda: _source(heldout), build=_decision, key=lambda row: row.prompt, seed=seed
        )
        self.num_train_tasks = len(self._rows.train)

    def task(self, index: int, *, split: str = "train") -> Decision:
        return self._rows.task(index, split=split)

    async def rollouts(self, task: Decision, num_rollouts: int, policy: Policy) -> list[Rollout]:
        attempts = await converse(policy, [Message(RENDERED, task.prompt)], num_rollouts)
        return [self._scored(attempt, task) for attempt in attempts]

    def _scored(self, attempt: Conversation, task: Decision) -> Rollout:
        action = chosen_action(attempt.answer) if attempt.finish_reason is FinishReason.STOP else None
        if action is not None:
            parts = {"action": float(action), "target_action": float(task.target)}
            return attempt.rollout(Score(task.rewards[action], {"reward_fn": task.rewards[action]} | parts))
        if self._invalid_reward is None:
            return attempt.rollout(None, attempt.fault or "no valid action, or cut off before it")
        return attempt.rollout(Score(self._invalid_reward, {"reward_fn": self._invalid_reward}))


def chosen_action(text: str) -> int | None:
    """`… so [1]? No, [3]` → 3; `None` without one, or for a digit that is no action."""
    found = _ACTION.findall(text)
    return int(found[-1]) if found and int(found[-1]) < NUM_ACTIONS else None


def _source(path: str) -> Source:
    folder = Path(path)
    files = sorted(folder.glob("*_harmony.csv")) if folder.is_dir() else [folder]
    if not files:
        raise ConfigError([f"path: {path!r} holds no *_harmony.csv; name another folder, or a file"])
    return (row for file in files for row in (_csv_rows(file) if file.suffix == ".csv" else file_rows(str(file))))


def _csv_rows(file: Path) -> Iterator[tuple[str, Any]]:
    try:
        with file.open(newline="", encoding="utf-8-sig") as lines:
            rows = csv.DictReader(lines)
            yield from ((f"{file}:{rows.line_num}", row) for row in rows)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError([f"path: '{file}' cannot be read ({error}); give a CSV or JSON lines file"]) from error


def _decision(row: Any, where: str) -> Decision:
    try:
        rewards, values = (
            tuple(float(row[f"{column}_action_{k}"]) for k in range(NUM_ACTIONS)) for column in ("reward", "q")
        )
        prompt = row["prompt"]
        if not isinstance(prompt, str) or not all(map(math.isfinite, rewards + values)):
            raise ValueError(f"prompt {prompt!r:.20}, rewards {rewards}, q {values}")
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            [f"{where}: needs a prompt, and numbers q_action_0..3 and reward_action_0..3: {error}"]
        ) from error
    return Decision(prompt if prompt.endswith(TO_ANSWER) else prompt + TO_ANSWER, rewards, values)
