"""Any task of reasoning-gym by name, with its own generator, configuration and verifier.

Items come from seeds of their own, drawn from ours, the split and the index; which split a question belongs to is a
hash of its text, so that the splits share no question whatever the seeds. Questions are endless for generators, and few
for the tasks that have a fixed number of them.
"""

import random
from collections.abc import Mapping
from typing import Any

from syncline.envs.scoring import Score, check_weights, weighted_score
from syncline.envs.single_turn import SingleTurn, check_split, hashed_split
from syncline.errors import ConfigError
from syncline.types import Message

_MAX_DRAWS = 1000


class ReasoningGym(SingleTurn):
    """`dataset` names the task (`leg_counting`), `config` are its own options.

    Parts of the reward: `correct` (the verifier gave full marks), `score` (what it gave, 0 to 1; the only one with
    weight unless asked), `format` (there is an `<answer>`).
    """

    name = "reasoning_gym"

    def __init__(
        self,
        *,
        dataset: str,
        config: Mapping[str, Any] | None = None,
        system_prompt: str = "default",
        weights: Mapping[str, float] | None = None,
        seed: int = 0,
    ) -> None:
        try:
            import reasoning_gym
            from reasoning_gym.utils import SYSTEM_PROMPTS, extract_answer
        except ImportError as error:
            raise ConfigError(["task: reasoning_gym needs `pip install 'syncline[reasoning-gym]'`"]) from error
        self._create = reasoning_gym.create_dataset
        self._extract = extract_answer
        self._prompt = SYSTEM_PROMPTS.get(system_prompt, system_prompt)
        self._dataset, self._config, self._seed = dataset, dict(config or {}), seed
        self.weights = check_weights(weights or {"score": 1.0}, parts=("correct", "score", "format"))
        if taken := {"seed", "size"} & set(self._config):
            raise ConfigError([f"config: {sorted(taken)} are chosen by the index of the task; leave them out"])
        try:
            self._one(0)
        except (ValueError, TypeError, AssertionError) as error:
            raise ConfigError([f"dataset: reasoning-gym makes no {dataset!r} with {self._config} ({error})"]) from error

    def task(self, index: int, *, split: str = "train") -> dict[str, Any]:
        """reasoning-gym's own item: question, answer, metadata."""
        check_split(split)
        rng = random.Random(f"{self._seed}/{split}/{index}")
        for _ in range(_MAX_DRAWS):
            item = self._one(rng.getrandbits(31))
            if hashed_split(item["question"]) == split:
                return item
        raise ConfigError([f"dataset: {self._dataset!r} has no {split} question in {_MAX_DRAWS} draws; it has too few"])

    def prompt(self, task: dict[str, Any]) -> list[Message]:
        return [Message("system", self._prompt), Message("user", task["question"])]

    def answer(self, task: dict[str, Any], text: str) -> str | None:
        del task
        return self._extract(text)

    def score(self, task: dict[str, Any], text: str) -> Score:
        answer = self._extract(text)
        marks = float(self._verifier.score_answer(answer, entry=task))
        parts = {"correct": float(marks == 1.0), "score": marks, "format": float(answer is not None)}
        return weighted_score(parts, self.weights)

    def _one(self, seed: int) -> dict[str, Any]:
        """A data set of one item, whose verifier is any other's of the same configuration."""
        self._verifier = self._create(self._dataset, seed=seed, size=1, **self._config)
        return self._verifier[0]
