"""The usual environment: one prompt, one answer, one score. A subclass writes `task`, `prompt` and `score`.

With a `toolbox` the model may call tools before it answers. What a subclass's code raises becomes a status.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Sequence
from typing import Any

from syncline.envs.conversation import Conversation, checked_messages, converse, score_each
from syncline.envs.scoring import Score, boundary
from syncline.envs.toolbox import Toolbox
from syncline.errors import ConfigError
from syncline.protocols import Policy
from syncline.types import Message, Rollout

SPLITS = ("train", "heldout")
HELDOUT_ONE_IN = 8
"""One generated task in so many is held out."""


class SingleTurn(ABC):
    """An `Environment` of one prompt and one answer; a subclass sets `name` and writes the three methods."""

    name: str
    toolbox: Toolbox | None = None

    @abstractmethod
    def task(self, index: int, *, split: str = "train") -> Any:
        """A pure function of the constructor's arguments, `index` and `split`; the splits share no task."""

    @abstractmethod
    def prompt(self, task: Any) -> Sequence[Message]: ...

    @abstractmethod
    def score(self, task: Any, text: str) -> Score | Awaitable[Score]:
        """Any text may come: a wrong or garbled answer is a low score, not an exception. May be `async`."""

    async def rollouts(self, task: Any, num_rollouts: int, policy: Policy) -> list[Rollout]:
        """`num_rollouts` attempts. A prompt that cannot be built or does not fit is `ERROR` for all of them."""
        messages, fault = await boundary("prompt", lambda: checked_messages("prompt", self.prompt(task)))
        if messages is None:
            return [Conversation(policy, ()).rollout(None, fault)] * num_rollouts
        if self.toolbox is None:
            attempts = await converse(policy, messages, num_rollouts)
        else:
            attempts = await self.toolbox.converse(policy, messages, num_rollouts)
        return await score_each(attempts, lambda attempt: self.score(task, attempt.answer))


def hashed_split(key: str) -> str:
    """`"heldout"` for one task in `HELDOUT_ONE_IN`, else `"train"`: a fixed hash of what makes it that task."""
    digest = hashlib.sha256(f"held out {key}".encode()).digest()
    return "heldout" if int.from_bytes(digest[:8], "big") % HELDOUT_ONE_IN == 0 else "train"


def check_split(split: str) -> None:
    if split not in SPLITS:
        raise ConfigError([f"split: {split!r} is not one of {', '.join(SPLITS)}"])
