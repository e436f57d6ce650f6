"""What each token of a sample says, by decoders that join bytes and eat spaces as tokenizers do."""

import pytest

from syncline.observe.tokens import TOKENS_SHOWN, texts, tokens_for_people
from syncline.types import Lack, TrainingSample, VersionSpan

PIECES = [b"caf", b"\xc3", b"\xa9", b"\xf0\x9f", b"\x98", b"\x80", b" is", b"\xff", b"!"]


def by_bytes(ids) -> str:
    """As byte-level BPE: a character cut short is a replacement character."""
    return b"".join(PIECES[i] for i in ids).decode(errors="replace")


def by_words(ids) -> str:
    """As SentencePiece: a space before each word but the first."""
    return "".join(f" w{i}" for i in ids).lstrip(" ")


@pytest.mark.parametrize(
    ("decode", "ids", "expected"),
    [
        (by_bytes, (0, 1, 2, 6, 8), ["caf", "", "é", " is", "!"]),
        (by_bytes, (3, 4, 5, 8, 3), ["", "", "😀", "!", ""]),
        (by_words, (4, 5, 6), ["w4", " w5", " w6"]),
        (by_bytes, (), []),
    ],
)
def test_a_character_is_the_last_of_its_tokens_and_a_space_stays_with_its_word(decode, ids, expected):
    assert list(texts(ids, decode)) == expected


def test_what_was_not_sampled_has_neither_logprob_nor_version():
    mask = (False, True, False, True)
    sample = TrainingSample(
        (1, 2, 3, 4), mask, (0.0, -0.123456, 0.0, -2.0), (VersionSpan(7, 1, 2), VersionSpan(8, 3, 4))
    )
    assert tokens_for_people(sample, by_words) == {
        "texts": ["w2", " w3", " w4"],
        "logprobs": [-0.1235, None, -2.0],
        "versions": [7, None, 8],
        "num_left_out": 0,
    }


def test_what_a_sample_lacks_is_not_invented_and_a_long_one_is_cut():
    count = TOKENS_SHOWN + 5
    mask = (False, *(True,) * count)
    sample = TrainingSample((1,) * len(mask), mask, (0.0,) * len(mask), (), (Lack.VERSIONS, Lack.LOGPROBS))
    told = tokens_for_people(sample, by_words)
    assert (set(told["logprobs"]), set(told["versions"]), told["num_left_out"]) == ({None}, {None}, 5)
    assert len(told["texts"]) == TOKENS_SHOWN
