"""How lm-evaluation-harness reads answers of its tasks `gsm8k` and `gsm8k_platinum`, to score the same outputs by.

Both filters and the comparison of `exact_match` as the tasks of version 3 state them (lm_eval 0.4.13); the tests
compare these lines with the library's own classes.
"""

import re

STRICT = re.compile(r"#### (\-?[0-9\.\,]+)")
FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
IGNORED = (",", r"\$", r"(?s).*#### ", r"\.$")
INVALID = "[invalid]"
UNTIL = ("Question:", "</s>", "<|im_end|>")
"""Where its generation ends; ours goes on to an end token, so what follows is cut off before it is read."""


def strict_match(text: str) -> str:
    """The filter `strict-match`: the first number after `#### `."""
    found = STRICT.findall(_until(text))
    return found[0].strip() if found else INVALID


def flexible_extract(text: str) -> str:
    """The filter `flexible-extract`: the last number anywhere."""
    found = FLEXIBLE.findall(_until(text))
    return next(part for part in found[-1] if part).strip() if found else INVALID


def exact_match(prediction: str, answer: str) -> bool:
    return _plain(prediction) == _plain(answer)


def _until(text: str) -> str:
    for end in UNTIL:
        text = text.partition(end)[0]
    return text


def _plain(text: str) -> str:
    for pattern in IGNORED:
        text = re.sub(pattern, "", text)
    return text.lower()
