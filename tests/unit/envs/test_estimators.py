"""Numbers worked by hand, and against brute force over every subset."""

from itertools import combinations

import pytest

from syncline.envs.estimators import majority_at, pass_at, sizes, wilson


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (81, 263, 0.2553, 0.3662), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_interval(successes: int, trials: int, low: float, high: float):
    """The last two: Newcombe 1998, Statistics in Medicine 17, table I, method 3."""
    assert wilson(successes, trials) == pytest.approx((low, high), abs=1e-4)


@pytest.mark.parametrize(
    ("correct", "samples", "k"), [(0, 5, 3), (1, 5, 1), (2, 5, 3), (3, 8, 4), (4, 5, 2), (5, 5, 1)]
)
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(correct: int, samples: int, k: int):
    subsets = list(combinations([True] * correct + [False] * (samples - correct), k))
    assert pass_at(correct, samples, k=k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


@pytest.mark.parametrize(
    ("answers", "right", "k", "rate"),
    [
        ("aab", "a", 3, 1.0),
        ("aab", "a", 1, 2 / 3),
        ("aab", "a", 2, (1.0 + 0.5 + 0.5) / 3),
        ("abb", "a", 3, 0.0),
        ("ab", "a", 2, 0.5),
        ("a--", "a", 3, 1.0),
        ("---", "a", 3, 0.0),
        ("bcda", "a", 4, 0.25),
    ],
)
def test_majority_of_k(answers: str, right: str, k: int, rate: float):
    votes = [None if answer == "-" else answer for answer in answers]
    assert majority_at(votes, [vote == right for vote in votes], k=k) == pytest.approx(rate)


def test_majority_of_many_samples_is_estimated_and_repeats():
    votes = ["a"] * 40 + ["b"] * 24
    first = majority_at(votes, [vote == "a" for vote in votes], k=9)
    assert first == majority_at(votes, [vote == "a" for vote in votes], k=9)
    assert first == pytest.approx(0.79, abs=0.05), "hypergeometric: P(at least 5 of 9 are a) = 0.789"


def test_sizes_are_powers_of_two_and_all():
    assert [sizes(n) for n in (1, 2, 6, 8)] == [[1], [1, 2], [1, 2, 4, 6], [1, 2, 4, 8]]
