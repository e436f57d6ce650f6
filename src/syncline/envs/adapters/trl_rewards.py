"""Reward functions written for TRL's `GRPOTrainer`, over rows with a `prompt`: `def reward(completions, **columns)`.

A group is scored in one call, as TRL does with a batch: `prompts`, `completions`, `completion_ids` and every other
column of the row arrive as lists, conversational where the row's prompt is a list of messages, plain text where it is a
string. Functions may be `async` (they run side by side) and may return `None` for what they do not apply to. Unlike in
TRL, an attempt to which no function applies, and a group whose function raises, is an `ERROR` without a reward, never
0.
"""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from syncline.envs.conversation import Conversation, converse, together
from syncline.envs.imports import imported
from syncline.envs.rows import PromptRow, Rows, open_rows, prompt_row
from syncline.envs.scoring import Score, boundary
from syncline.errors import ConfigError
from syncline.protocols import Policy
from syncline.types import FinishReason, Rollout


class TrlRewards:
    """An `Environment` of rows and reward functions. Each function's reward is a part under its name.

    `rewards` are import paths; `weights` one number each (default 1). Rows come from `path` and `heldout_path` (JSONL),
    or from the hub's `dataset` (with `dataset_config`), splits `train` and `heldout_split`.
    """

    name = "trl_rewards"

    def __init__(
        self,
        *,
        rewards: Sequence[str],
        weights: Sequence[float] | None = None,
        path: str | None = None,
        heldout_path: str | None = None,
        dataset: str | None = None,
        dataset_config: str | None = None,
        heldout_split: str = "test",
        seed: int = 0,
    ) -> None:
        self._rewards = {path.partition(":")[2]: imported(path, field="rewards") for path in rewards}
        if not rewards or len(self._rewards) != len(rewards):
            raise ConfigError([f"rewards: {list(rewards)} must name one or more functions of different names"])
        self._weights = _checked_weights(weights, len(rewards))
        hub = (dataset, dataset_config) if dataset else None
        train, heldout = open_rows(path, heldout_path, hub=hub, heldout_split=heldout_split)
        self._rows = Rows(train, heldout, build=prompt_row, key=lambda row: row.key, seed=seed)
        self.num_train_tasks = len(self._rows.train)

    def task(self, index: int, *, split: str = "train") -> PromptRow:
        return self._rows.task(index, split=split)

    async def rollouts(self, task: PromptRow, num_rollouts: int, policy: Policy) -> list[Rollout]:
        attempts = await converse(policy, task.messages, num_rollouts)
        alive = [a for a in attempts if a.fault is None and a.finish_reason is not FinishReason.ABORT]
        scores, fault = await boundary("rewards", lambda: self._scores(task, alive)) if alive else ([], None)
        by_attempt = dict(zip(map(id, alive), scores or [], strict=False))
        nothing = fault or "no reward function applies to this attempt: all returned None"
        return [a.rollout(score := by_attempt.get(id(a)), None if score else nothing) for a in attempts]

    async def _scores(self, task: PromptRow, attempts: Sequence[Conversation]) -> list[Score | None]:
        """One score an attempt; `None` where every function returned `None`."""
        logged: dict[str, float] = {}
        given = _given(task, attempts) | {"log_metric": logged.__setitem__, "log_extra": lambda column, values: None}
        calls = [_call(name, function, given) for name, function in self._rewards.items()]
        by_function = dict(zip(self._rewards, await together(calls), strict=True))
        return [self._score({n: v[i] for n, v in by_function.items()}, logged) for i in range(len(attempts))]

    def _score(self, values: Mapping[str, float | None], logged: Mapping[str, float]) -> Score | None:
        parts = {name: float(value) for name, value in values.items() if value is not None}
        if not parts:
            return None
        weights = dict(zip(self._rewards, self._weights, strict=True))
        return Score(sum(weights[name] * value for name, value in parts.items()), {**logged, **parts})


def _given(task: PromptRow, attempts: Sequence[Conversation]) -> dict[str, Any]:
    """What TRL hands to a reward function, as lists of one entry an attempt."""
    if isinstance(task.prompt, str):
        prompt: Any = task.prompt
        completions: list[Any] = [attempt.answer for attempt in attempts]
    else:
        prompt = [{"role": m.role, "content": m.content} for m in task.prompt]
        completions = [[{"role": "assistant", "content": attempt.answer}] for attempt in attempts]
    num = len(attempts)
    return {name: [value] * num for name, value in task.columns.items()} | {
        "prompts": [prompt] * num,
        "completions": completions,
        "completion_ids": [_sampled(attempt) for attempt in attempts],
    }


def _sampled(attempt: Conversation) -> list[int]:
    sample = attempt.samples[-1]
    return [token for token, own in zip(sample.token_ids, sample.loss_mask, strict=True) if own]


async def _call(name: str, function: Callable[..., Any], given: Mapping[str, Any]) -> list[float | None]:
    values = function(**given)
    values = list(await values if inspect.isawaitable(values) else values)
    if len(values) != len(given["completions"]):
        raise ValueError(f"{name} returned {len(values)} rewards for {len(given['completions'])} completions")
    return [None if value is None or math.isnan(value) else value for value in values]


def _checked_weights(weights: Sequence[float] | None, num: int) -> tuple[float, ...]:
    found = tuple(weights) if weights is not None else (1.0,) * num
    if len(found) != num or not all(isinstance(w, int | float) and math.isfinite(w) for w in found):
        raise ConfigError([f"weights: {list(found)} must be {num} finite numbers, one a reward function"])
    return found
