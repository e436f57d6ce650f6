"""Messages to tokens and back: `ChatPolicy` is the `Policy` that environments hold over any `Generate`."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from syncline.errors import ConfigError
from syncline.protocols import Generate
from syncline.types import Completion, Message, SamplingParams


def load_tokenizer(path: str) -> Any:
    """A transformers tokenizer from a folder or the hub. Raises `ConfigError` when there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        remedy = "give a folder with tokenizer files or a hub name that can be reached from here"
        raise ConfigError([f"model.tokenizer: {path!r} has no tokenizer that loads; {remedy} ({error})"]) from error


class ChatPolicy:
    """A tokenizer, a `Generate` and the run's `SamplingParams`, as one `Policy`.

    Messages go through the tokenizer's chat template. A tokenizer without one belongs to a model that was never
    taught to chat: it reads the plain contents, one after the other.
    """

    def __init__(self, tokenizer: Any, generate: Generate, sampling: SamplingParams, *, max_length: int) -> None:
        self._tokenizer = tokenizer
        self._generate = generate
        self._sampling = sampling
        self._max_length = max_length
        """Prompt and completion together, in tokens."""

    def encode(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """Prompt tokens. Raises `ValueError` for an empty prompt and for one that leaves no room for an answer."""
        if self._tokenizer.chat_template:
            chat = [{"role": m.role, "content": m.content} for m in messages]
            ids = self._tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        else:
            ids = self._tokenizer.encode("".join(m.content for m in messages))
        if not ids:
            raise ValueError("the prompt has no tokens; give it some text")
        if len(ids) >= self._max_length:
            raise ValueError(
                f"the prompt has {len(ids)} tokens and model.max_length = {self._max_length} leaves no room for a "
                "completion; raise model.max_length or leave such tasks out"
            )
        return tuple(ids)

    def decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=True)

    async def sample(self, prompt_token_ids: Sequence[int], *, num_completions: int) -> list[Completion]:
        """Completions of at most `max_tokens`, and of no more than `max_length` leaves room for."""
        room = self._max_length - len(prompt_token_ids)
        sampling = replace(self._sampling, max_tokens=min(self._sampling.max_tokens, room))
        return await self._generate.generate(prompt_token_ids, sampling, num_completions=num_completions)
