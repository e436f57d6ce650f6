"""An environment any model can be rewarded in, random weights included: the share of even token ids."""

from typing import Any

from syncline.protocols import Policy
from syncline.types import Message, Rollout, RolloutStatus, TrainingSample


class EvenTokens:
    name = "even_tokens"

    def __init__(self, prompt_tokens: int = 0) -> None:
        self._prompt_tokens = prompt_tokens

    def task(self, index: int, *, split: str = "train") -> Any:
        """At least so many characters, each of them a token of `bench.shapes.tokenizer`."""
        return f"{split} {index}: ".ljust(self._prompt_tokens, ".")

    async def rollouts(self, task: Any, num_rollouts: int, policy: Policy) -> list[Rollout]:
        prompt = policy.encode([Message("user", task)])
        completions = await policy.sample(prompt, num_completions=num_rollouts)
        return [
            Rollout(
                (TrainingSample.from_completion(prompt, c),),
                sum(t % 2 == 0 for t in c.token_ids) / len(c.token_ids),
                RolloutStatus.COMPLETED,
            )
            for c in completions
        ]
