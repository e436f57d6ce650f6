"""One attempt, turn by turn: what was said, and the tokens exactly as they were given and sampled.

`Conversation.take` is the only way tokens enter an attempt. A turn whose prompt begins with the tokens so far goes on
with the same `TrainingSample`; where the chat template renders that history otherwise, a new one begins. What was
sampled is never tokenized again, so loss mask, log-probabilities and versions are always those of sampled tokens.

`converse` samples the first turn of a whole group in one call, so that the engine computes the prompt once; from then
on the attempts go their own ways side by side, each waiting for its own replies (tools, a game, a user) and answers.
"""

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from typing import Any, TypeVar

from syncline.envs.rendering import NoRoom
from syncline.envs.scoring import Score, boundary, checked
from syncline.errors import EngineError
from syncline.protocols import Policy
from syncline.types import Completion, FinishReason, ImageRef, Message, Rollout, RolloutStatus, TrainingSample

T = TypeVar("T")
Messages = tuple[Message, ...]
Reply = Callable[[Messages], Sequence[Message] | Awaitable[Sequence[Message]]]
"""What the world says to the conversation so far, whose last message is the model's; nothing: it is over."""


class Conversation:
    """An attempt under way. `samples` holds one sample a history, `messages` what people read."""

    def __init__(self, policy: Policy, messages: Sequence[Message]) -> None:
        self._policy = policy
        self.messages: Messages = tuple(messages)
        self.samples: list[TrainingSample] = []
        self._tokens: tuple[int, ...] = ()
        """As they were given and sampled, one placeholder an image: `samples` have them as the engine read them."""
        self.finish_reason = FinishReason.STOP
        self.out_of_room = False
        """The context or the turns ended before the conversation did."""
        self.fault: str | None = None
        """What escaped from the environment's own code."""

    @property
    def over(self) -> bool:
        return self.finish_reason is not FinishReason.STOP or self.out_of_room or self.fault is not None

    @property
    def answer(self) -> str:
        """What the model said last."""
        return self.messages[-1].content if self.messages[-1].role == "assistant" else ""

    async def ask(self) -> None:
        """Samples the next answer. Messages that leave no room for one, or cannot be rendered, end the conversation."""
        prompt, self.fault = await boundary("encode", self._prompt)
        if prompt:
            [completion] = await self._policy.sample(prompt, num_completions=1, images=shown(self.messages))
            self.take(prompt, completion)

    def _prompt(self) -> tuple[int, ...]:
        try:
            return self._policy.encode(self.messages, after=self._tokens)
        except NoRoom:
            self.out_of_room = True
            return ()

    def take(self, prompt_token_ids: tuple[int, ...], completion: Completion) -> None:
        """What was sampled from the prompt becomes the next turn."""
        if completion.token_ids and not completion.versions:
            raise EngineError("the engine sampled without a policy version: nothing has been published to it yet")
        prompt, images = completion.prompt_token_ids or prompt_token_ids, shown(self.messages)
        last = self.samples[-1] if self.samples else None
        if last and prompt[: len(last.token_ids)] == last.token_ids:
            new = images[len(last.images) :]
            self.samples[-1] = last.extended(prompt[len(last.token_ids) :], completion, images=new)
        else:
            self.samples.append(TrainingSample.from_completion(prompt, completion, images=images))
        self._tokens = (*prompt_token_ids, *completion.token_ids)
        self.messages = (*self.messages, Message("assistant", self._policy.decode(completion.token_ids)))
        self.finish_reason = completion.finish_reason

    def rollout(self, score: Score | None, fault: str | None = None) -> Rollout:
        """The attempt with its score, or with what was wrong with scoring it."""
        fault = self.fault or fault
        if self.finish_reason is FinishReason.ABORT:
            return self._failed(RolloutStatus.ABORTED, "the engine aborted the request")
        if score is None or fault:
            return self._failed(RolloutStatus.ERROR, fault or "the attempt was not scored")
        cut = self.out_of_room or self.finish_reason is FinishReason.LENGTH
        status = RolloutStatus.TRUNCATED if cut else RolloutStatus.COMPLETED
        return Rollout(tuple(self.samples), score.reward, status, score.parts, self.messages)

    def _failed(self, status: RolloutStatus, error: str) -> Rollout:
        return Rollout(tuple(self.samples), None, status, messages=self.messages, error=error)


def checked_messages(what: str, value: object) -> Messages:
    """What an environment's own code said. Raises `TypeError` for a text, a single message, or anything else."""
    found = tuple(value) if isinstance(value, Iterable) else None
    if found is None or not all(isinstance(one, Message) for one in found):
        raise TypeError(f"{what}() must return a list of messages, got {value!r:.80}")
    return found


def shown(messages: Sequence[Message]) -> tuple[ImageRef, ...]:
    """The images of a conversation, in order."""
    return tuple(image for message in messages for image in message.images)


async def converse(
    policy: Policy, messages: Sequence[Message], num_attempts: int, *, reply: Reply | None = None, max_turns: int = 1
) -> list[Conversation]:
    """`num_attempts` conversations from the same messages, each of at most `max_turns` answers.

    A prompt that does not fit, or a `reply` that raises, is the `fault` of the conversations concerned.
    """
    attempts = [Conversation(policy, messages) for _ in range(num_attempts)]
    prompt, fault = await boundary("encode", lambda: policy.encode(messages))
    if prompt is None:
        for attempt in attempts:
            attempt.fault = fault
        return attempts
    completions = await policy.sample(prompt, num_completions=num_attempts, images=shown(messages))
    for attempt, completion in zip(attempts, completions, strict=True):
        attempt.take(prompt, completion)
    if reply is not None:
        await together([_go_on(attempt, reply, max_turns) for attempt in attempts])
    return attempts


async def _go_on(attempt: Conversation, reply: Reply, max_turns: int) -> None:
    """Reply and answer in turn, until one of them ends it."""
    for turn in range(1, max_turns + 1):
        if attempt.over:
            return
        said, attempt.fault = await boundary("reply", lambda: _said(reply, attempt.messages))
        if not said:
            return
        attempt.messages = (*attempt.messages, *said)
        if turn == max_turns:
            attempt.out_of_room = True
        else:
            await attempt.ask()


async def _said(reply: Reply, messages: Messages) -> Messages:
    said = reply(messages)
    return checked_messages("reply", (await said if inspect.isawaitable(said) else said) or ())


async def together(coroutines: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """Their results; when one raises, the others are cancelled before its error goes on."""
    tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


async def score_each(
    attempts: Sequence[Conversation], score: Callable[[Conversation], Score | Awaitable[Score]]
) -> list[Rollout]:
    """Every attempt with its own score; one that failed before is not scored."""

    async def one(attempt: Conversation) -> Rollout:
        if attempt.fault or attempt.finish_reason is FinishReason.ABORT:
            return attempt.rollout(None)
        value, fault = await boundary("score", lambda: score(attempt))
        if value is not None:
            value, fault = await boundary("score", lambda: checked(value))
        return attempt.rollout(value, fault)

    return await together([one(attempt) for attempt in attempts])
