"""Pairs as DPO trains on them: the very tokens that were sampled, checked line by line before a model is loaded.

A pair that names its tokens is taken by them, so nothing is tokenised anew and a truncated answer gets no end it never
had; one without (another tool's, in TRL's conversational format) is rendered, and ends with the end token.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from syncline.envs.rendering import rendered
from syncline.errors import ConfigError
from syncline.offline.lines import read_records
from syncline.types import Message


@dataclass(frozen=True, slots=True)
class Preference:
    prompt_ids: tuple[int, ...]
    chosen_ids: tuple[int, ...]
    rejected_ids: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        return 2 * len(self.prompt_ids) + len(self.chosen_ids) + len(self.rejected_ids)


def read_preferences(path: Path, tokenizer: Any, *, max_length: int, model: str | None) -> list[Preference]:
    """In the file's order. `model` is the digest of the policy that must have sampled them; `None` takes any.

    Raises `ConfigError`: for a file without pairs, and for up to five lines that cannot be trained on, each by place.
    """
    faults: list[str] = []
    found: list[Preference] = []
    for where, record in read_records(path):
        try:
            found.append(_preference(record, tokenizer, max_length=max_length, model=model))
        except ValueError as error:
            faults.append(f"{where}: {error}")
    if faults:
        rest = [f"… and {len(faults) - 5} more lines of {path}"] if len(faults) > 5 else []
        raise ConfigError([*faults[:5], *rest])
    if not found:
        raise ConfigError([f"{path}: holds no pair; see the pairs' report for what was left out and why"])
    return found


def _preference(record: Mapping[str, Any], tokenizer: Any, *, max_length: int, model: str | None) -> Preference:
    messages = {field: tuple(_messages(record, field)) for field in ("prompt", "chosen", "rejected")}
    provenance = _provenance(record)
    _refuse_other_model(provenance, model)
    if messages["chosen"] == messages["rejected"]:
        raise ValueError("chosen and rejected are the same; leave such a pair out")
    if not (prompt := tuple(rendered(tokenizer, messages["prompt"]))):
        raise ValueError("field 'prompt': has no tokens")
    answers = [_answer_ids(messages, field, provenance, tokenizer) for field in ("chosen", "rejected")]
    longest = len(prompt) + max(map(len, answers))
    if longest > max_length:
        raise ValueError(f"prompt and answer have {longest} tokens, above model.max_length = {max_length}; raise it")
    return Preference(prompt, *answers)


def _provenance(record: Mapping[str, Any]) -> Mapping[str, Any]:
    found = record.get("provenance") or {}
    parts = (found, *(found.get(field) or {} for field in ("chosen", "rejected"))) if isinstance(found, Mapping) else ()
    if not parts or not all(isinstance(part, Mapping) for part in parts):
        raise ValueError(f"field 'provenance': {found!r} is not what `syncline pairs` writes; leave it out")
    return found


def _refuse_other_model(provenance: Mapping[str, Any], model: str | None) -> None:
    sampled_by = provenance.get("model")
    if model is not None and sampled_by != model:
        raise ValueError(
            f"provenance.model: {str(sampled_by)[:12]!r} sampled these answers, and {model[:12]!r} is to be trained; "
            "collect with the model that is trained"
        )


def _messages(record: Mapping[str, Any], field: str) -> Iterator[Message]:
    value = record.get(field)
    if not isinstance(value, list) or not value:
        raise ValueError(f"field {field!r} is missing or no list of messages; it has {', '.join(map(repr, record))}")
    for message in value:
        if not isinstance(message, Mapping) or not isinstance(message.get("content"), str) or "role" not in message:
            raise ValueError(f"field {field!r}: {message!r} is no message; one is {{role, content}}")
        yield Message(message["role"], message["content"])
    if field != "prompt" and not "".join(m["content"] for m in value).strip():
        raise ValueError(f"field {field!r}: is empty")


def _answer_ids(
    messages: Mapping[str, Sequence[Message]], field: str, provenance: Mapping[str, Any], tokenizer: Any
) -> tuple[int, ...]:
    text = "".join(message.content for message in messages[field])
    sampled = (provenance.get(field) or {}).get("token_ids")
    if sampled is None and tokenizer.eos_token_id is None:
        raise ValueError(f"field {field!r}: names no tokens, and the tokenizer has no end token; give it one")
    if sampled is None:
        return (*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id)
    if tokenizer.decode(sampled, skip_special_tokens=True) != text:
        raise ValueError(f"provenance.{field}.token_ids: are not the tokens of its text; the tokenizer is another one")
    return tuple(sampled)
