"""A sample's tokens for people: what each says, how likely its sampler found it, and which policy version drew it."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from syncline.types import Lack, TrainingSample

TOKENS_SHOWN = 256
"""Of each attempt, from the first sampled one: the text is kept whole beside them."""
_UNFINISHED = "�"

Decode = Callable[[Sequence[int]], str]


def tokens_for_people(sample: TrainingSample, decode: Decode) -> dict[str, Any]:
    """Lists of one length. A token that was not sampled (a tool's answer) has neither logprob nor version, and a
    sample that lacks either has it nowhere."""
    first = next((i for i, sampled in enumerate(sample.loss_mask) if sampled), len(sample.token_ids))
    last = min(first + TOKENS_SHOWN, len(sample.token_ids))
    versions: list[int | None] = [None] * len(sample.token_ids)
    for span in sample.versions:
        versions[span.start : span.end] = [span.policy_version] * (span.end - span.start)
    known = Lack.LOGPROBS not in sample.lacks
    return {
        "texts": list(texts(sample.token_ids[first:last], decode)),
        "logprobs": [
            round(sample.logprobs[i], 4) if known and sample.loss_mask[i] else None for i in range(first, last)
        ],
        "versions": [versions[i] if sample.loss_mask[i] else None for i in range(first, last)],
        "num_left_out": len(sample.token_ids) - last,
    }


def texts(token_ids: Sequence[int], decode: Decode) -> Iterator[str]:
    """What each token adds to the text. A character of several tokens is its last one's, the others add nothing.

    A token's text depends on the one before it (spaces at the start), so each is decoded behind its predecessor.
    """
    behind = begun = 0
    for i in range(1, len(token_ids) + 1):
        before, now = decode(token_ids[behind:begun]), decode(token_ids[behind:i])
        if len(now) <= len(before) or now.endswith(_UNFINISHED):
            yield ""
            continue
        yield now[len(before) :]
        behind, begun = begun, i
