"""A tokenizer of one token a character, and completions made of text: environments run on them without an engine."""

from collections.abc import Sequence

from syncline.types import Completion, FinishReason, VersionSpan


class CharacterTokenizer:
    """The part of a transformers tokenizer that `ChatPolicy` uses."""

    chat_template = None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [ord(character) for character in text]

    def decode(
        self, token_ids: Sequence[int], *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool = False
    ) -> str:
        return "".join(chr(token) for token in token_ids)


def completion(text: str, *, finish_reason: FinishReason = FinishReason.STOP, policy_version: int = 0) -> Completion:
    """`text` as the engine would answer it; an empty text has no tokens."""
    versions = (VersionSpan(policy_version, 0, len(text)),) if text else ()
    return Completion(tuple(map(ord, text)), (-0.5,) * len(text), versions, finish_reason)
