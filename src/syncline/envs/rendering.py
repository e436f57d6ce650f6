"""Messages to tokens and back: `ChatPolicy` is the `Policy` that environments hold over any `Generate`."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from syncline.config.model_folder import read_settings
from syncline.errors import ConfigError
from syncline.protocols import Generate
from syncline.types import Completion, ImageRef, Message, SamplingParams

RENDERED = "rendered"
"""The role of a message that is the whole prompt in the model's chat format already, special tokens written out."""


def load_tokenizer(path: str) -> Any:
    """A transformers tokenizer from a folder or the hub. Raises `ConfigError` when there is none."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoTokenizer

    try:
        if (beside := Path(path) / "config.json").exists():  # transformers looks into it
            read_settings(beside, field="model.tokenizer")
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, StrictDataclassError) as error:
        remedy = "give a folder with tokenizer files or a hub name that can be reached from here"
        raise ConfigError([f"model.tokenizer: {path!r} has no tokenizer that loads; {remedy} ({error})"]) from error


def rendered(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """Prompt tokens of messages, as `ChatPolicy` tells; an image has one placeholder. Raises `ValueError`."""
    if [m.role for m in messages] == [RENDERED]:
        return tokenizer.encode(messages[0].content, add_special_tokens=False)
    if tokenizer.chat_template:
        from jinja2 import TemplateError

        chat = [_turn(message) for message in messages]
        try:
            return tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        except TemplateError as error:
            raise ValueError(f"the chat template refuses {[m.role for m in messages]} messages: {error}") from error
    if any(message.images for message in messages):
        raise ValueError("the tokenizer has no chat template, which says where images go; give model.tokenizer one")
    return tokenizer.encode("".join(m.content for m in messages))


class NoRoom(ValueError):
    """A prompt as long as the model's context, or longer."""


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

    def encode(self, messages: Sequence[Message], *, after: Sequence[int] = ()) -> tuple[int, ...]:
        """Prompt tokens. Raises `ValueError` for an empty prompt, `NoRoom` for one that leaves none for an answer."""
        ids = self._rendered(messages) if not after else self._continued(messages, tuple(after))
        if not ids:
            raise ValueError("the prompt has no tokens; give it some text")
        if len(ids) >= self._max_length:
            raise NoRoom(
                f"the prompt has {len(ids)} tokens and model.max_length = {self._max_length} leaves no room for a "
                "completion; raise model.max_length or leave such tasks out"
            )
        return tuple(ids)

    def _rendered(self, messages: Sequence[Message]) -> list[int]:
        return rendered(self._tokenizer, messages)

    def _continued(self, messages: Sequence[Message], after: tuple[int, ...]) -> Sequence[int]:
        """`after` and the tokens of what the rendered text has beyond it; a new rendering where the text is another.

        Texts are compared, not tokens: what was sampled need not be what the tokenizer makes of its text.
        """
        if not self._tokenizer.chat_template:
            return self._continued_plainly(messages, after)
        chat = [_turn(message) for message in messages]
        text = self._tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        so_far = self._tokenizer.decode(list(after), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if not text.startswith(so_far):
            return self._rendered(messages)
        return (*after, *self._tokenizer.encode(text[len(so_far) :], add_special_tokens=False))

    def _continued_plainly(self, messages: Sequence[Message], after: tuple[int, ...]) -> Sequence[int]:
        """Without a template nothing separates messages but what the model itself sampled to end its answer."""
        text, so_far = "".join(m.content for m in messages), self.decode(after)
        if not text.startswith(so_far):
            return self._rendered(messages)
        return (*after, *self._tokenizer.encode(text[len(so_far) :], add_special_tokens=False))

    def decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=True)

    async def sample(
        self, prompt_token_ids: Sequence[int], *, num_completions: int, images: Sequence[ImageRef] = ()
    ) -> list[Completion]:
        """Completions of at most `max_tokens`, and of no more than `max_length` leaves room for: the engine, which
        knows how long images are, ends them there."""
        room = self._max_length - len(prompt_token_ids)
        sampling = replace(self._sampling, max_tokens=min(self._sampling.max_tokens, room))
        return await self._generate.generate(prompt_token_ids, sampling, num_completions=num_completions, images=images)


def _turn(message: Message) -> dict[str, Any]:
    """As chat templates read it: a text, or the images and then the text."""
    if not message.images:
        return {"role": message.role, "content": message.content}
    shown: list[dict[str, str]] = [{"type": "image"} for _ in message.images]
    return {"role": message.role, "content": [*shown, {"type": "text", "text": message.content}]}
