"""A conversation of several turns: a game, a simulated user, a search.

A subclass writes `task`, `prompt`, `reply` and `score`. The state of an attempt is what was said: `reply` and `score`
read it off the messages, so that attempts share nothing.
"""

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Sequence
from typing import Any

from syncline.envs.conversation import Conversation, Messages, checked_messages, converse, score_each
from syncline.envs.scoring import Score, boundary
from syncline.protocols import Policy
from syncline.types import Message, Rollout


class MultiTurn(ABC):
    """An `Environment` that answers back. A subclass sets `name`, `max_turns` (the model's answers) and the methods."""

    name: str
    max_turns: int = 8

    @abstractmethod
    def task(self, index: int, *, split: str = "train") -> Any:
        """A pure function of the constructor's arguments, `index` and `split`; the splits share no task."""

    @abstractmethod
    def prompt(self, task: Any) -> Sequence[Message]: ...

    @abstractmethod
    def reply(self, task: Any, messages: Messages) -> Sequence[Message] | Awaitable[Sequence[Message]]:
        """What follows the model's last message; nothing ends the conversation. May be `async`.

        A reply after the last turn is not answered any more: the rollout is `TRUNCATED`, and scored.
        """

    @abstractmethod
    def score(self, task: Any, messages: Messages) -> Score | Awaitable[Score]:
        """The whole conversation's worth. May be `async`."""

    async def rollouts(self, task: Any, num_rollouts: int, policy: Policy) -> list[Rollout]:
        messages, fault = await boundary("prompt", lambda: checked_messages("prompt", self.prompt(task)))
        if messages is None:
            return [Conversation(policy, ()).rollout(None, fault)] * num_rollouts
        attempts = await converse(
            policy, messages, num_rollouts, reply=lambda said: self.reply(task, said), max_turns=self.max_turns
        )
        return await score_each(attempts, lambda attempt: self.score(task, attempt.messages))
