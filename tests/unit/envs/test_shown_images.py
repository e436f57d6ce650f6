"""Pictures on their way from an environment to a sample: asked for by reference, kept as the engine read them."""

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from syncline.envs.conversation import converse
from syncline.envs.rendering import ChatPolicy
from syncline.testing import FakeGenerate
from syncline.trajectory.wire import decode_group, encode_group
from syncline.types import (
    Completion,
    FinishReason,
    ImageRef,
    Message,
    Rollout,
    RolloutGroup,
    RolloutStatus,
    SamplingParams,
    TrainingSample,
    VersionSpan,
)

A, B = ImageRef("a.png", "a" * 64), ImageRef("b.png", "b" * 64)
PLACEHOLDER = ord("#")
WIDTHS = {A: 3, B: 2}
"""Placeholders an image has, once the engine has read it."""


class Letters:
    """A tokenizer of one token a character; `#` stands for an image."""

    chat_template = "yes"

    def apply_chat_template(self, chat: list[dict[str, Any]], *, tokenize: bool = True, **options: Any) -> Any:
        text = "".join(self._turn(turn) for turn in chat)
        return [ord(c) for c in text] if tokenize else text

    def _turn(self, turn: dict[str, Any]) -> str:
        parts = turn["content"]
        said = parts if isinstance(parts, str) else "".join("#" if p["type"] == "image" else p["text"] for p in parts)
        return said if turn["role"] == "assistant" else f"[{said}]"

    def decode(self, token_ids: Sequence[int], **options: Any) -> str:
        return "".join(map(chr, token_ids))

    def encode(self, text: str, **options: Any) -> list[int]:
        return [ord(c) for c in text]


def expanding(prompt: Sequence[int], images: Sequence[ImageRef]) -> tuple[int, ...]:
    left = iter(images)
    return tuple(t for token in prompt for t in ([token] * WIDTHS[next(left)] if token == PLACEHOLDER else [token]))


class Engine(FakeGenerate):
    """Says `!`, and how it read the prompt."""

    def __init__(self) -> None:
        super().__init__(lambda prompt, sampling, i: self._say(prompt))

    def _say(self, prompt: Sequence[int]) -> Completion:
        read = expanding(prompt, self.images[-1]) if self.images[-1] else ()
        return Completion((ord("!"),), (-1.0,), (VersionSpan(0, 0, 1),), FinishReason.STOP, read)


def attempt(engine: Engine, messages: Sequence[Message], replies: Sequence[Message] = ()) -> list[TrainingSample]:
    policy = ChatPolicy(Letters(), engine, SamplingParams(4), max_length=100)
    said = list(replies)
    reply = lambda messages: [said.pop(0)] if said else []  # noqa: E731
    [conversation] = asyncio.run(converse(policy, messages, 1, reply=reply, max_turns=3))
    return conversation.samples


def test_a_sample_has_the_prompt_as_the_engine_read_it_and_refers_to_its_images() -> None:
    engine = Engine()
    [sample] = attempt(engine, [Message("user", "what?", (A, B))])
    assert "".join(map(chr, sample.token_ids)) == "[#####what?]!"
    assert sample.images == (A, B)
    assert engine.calls[0][0] == tuple(map(ord, "[##what?]"))
    assert engine.images == [(A, B)]


def test_a_later_turn_goes_on_with_the_sample_and_adds_its_own_images() -> None:
    engine = Engine()
    [sample] = attempt(
        engine, [Message("user", "what?", (A,))], [Message("user", "and?", (B,)), Message("user", "so?")]
    )
    assert "".join(map(chr, sample.token_ids)) == "[###what?]![##and?]![so?]!"
    assert sample.images == (A, B)
    assert sum(sample.loss_mask) == 3
    assert engine.images == [(A,), (A, B), (A, B)], "an engine reads every image of its prompt"


def test_text_is_as_it_was() -> None:
    engine = Engine()
    [sample] = attempt(engine, [Message("user", "what?")])
    assert "".join(map(chr, sample.token_ids)) == "[what?]!"
    assert (sample.images, engine.images) == ((), [()])


def test_images_without_a_template_have_no_place() -> None:
    tokenizer = Letters()
    tokenizer.chat_template = ""
    policy = ChatPolicy(tokenizer, Engine(), SamplingParams(4), max_length=100)
    with pytest.raises(ValueError, match="has no chat template, which says where images go"):
        policy.encode([Message("user", "what?", (A,))])


def test_references_cross_the_wire_once_a_sample_and_pixels_never() -> None:
    [sample] = attempt(Engine(), [Message("user", "what?", (A,))])
    rollout = Rollout((sample,), 1.0, RolloutStatus.COMPLETED, messages=(Message("user", "what?", (A,)),))
    group = RolloutGroup("g", "e", 0, (rollout, rollout))
    assert decode_group(encode_group(group)) == group
    assert len(encode_group(group)) < 1500


@pytest.mark.parametrize(("path", "sha256"), [("", "a" * 64), ("a.png", "a" * 63), ("a.png", "A" * 64)])
def test_a_reference_names_a_file_and_its_content(path: str, sha256: str) -> None:
    with pytest.raises(ValueError, match=r"path must not be empty|64 hex digits"):
        ImageRef(path, sha256)
