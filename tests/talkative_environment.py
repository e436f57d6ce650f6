"""An environment that always answers back, for random models: its rewards vary, and nothing has to be right."""

from collections.abc import Sequence

from syncline.envs.multi_turn import MultiTurn
from syncline.envs.scoring import Score
from syncline.types import Message


class Talkative(MultiTurn):
    name = "talkative"
    max_turns = 3

    def task(self, index: int, *, split: str = "train") -> str:
        return f"{split} {index}"

    def prompt(self, task: str) -> list[Message]:
        return [Message("user", f"tell me about {task}")]

    async def reply(self, task: str, messages: Sequence[Message]) -> list[Message]:
        return [Message("user", "go on")]

    def score(self, task: str, messages: Sequence[Message]) -> Score:
        said = "".join(m.content for m in messages if m.role == "assistant")
        return Score(sum(character in "aeiou" for character in said) / max(1, len(said)))
