"""What a set of attempts says about a model: rates with intervals, the best of k, the vote of k."""

import math
import random
from collections import Counter
from collections.abc import Sequence
from itertools import combinations

Z_95 = 1.959964
"""Standard normal quantile of a two-sided 95 % interval."""
MAX_SUBSETS = 1000


def wilson(successes: float, trials: int) -> tuple[float, float]:
    """Score interval of a proportion at 95 % (Wilson 1927, JASA 22, eq. for p̂ ± z): never outside [0, 1].

    `successes` may be a sum of rates between 0 and 1, one a trial: their variance is at most that of yes and no, so the
    interval is then too wide rather than too narrow.
    """
    share, z2 = successes / trials, Z_95**2
    center = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    half = Z_95 / (1 + z2 / trials) * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials**2))
    return max(0.0, center - half), min(1.0, center + half)


def pass_at(num_correct: int, num_samples: int, *, k: int) -> float:
    """Chance that one of k samples is right, unbiased: 1 - C(n-c, k) / C(n, k) (Chen et al. 2021, arXiv:2107.03374)."""
    return 1.0 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def majority_at(answers: Sequence[str | None], correct: Sequence[bool], *, k: int) -> float:
    """Chance that the most frequent answer of k samples is right (self-consistency, Wang et al., arXiv:2203.11171).

    The mean over all sets of k, or over `MAX_SUBSETS` of them drawn by a fixed seed. `None` casts no vote; answers that
    tie count a share each; without a vote nothing is right.
    """
    right = {answer for answer, is_right in zip(answers, correct, strict=True) if is_right}
    if math.comb(len(answers), k) <= MAX_SUBSETS:
        subsets = [list(chosen) for chosen in combinations(answers, k)]
    else:
        rng = random.Random(k)
        subsets = [rng.sample(list(answers), k) for _ in range(MAX_SUBSETS)]
    return sum(_share_right(subset, right) for subset in subsets) / len(subsets)


def _share_right(answers: Sequence[str | None], right: set[str | None]) -> float:
    votes = Counter(answer for answer in answers if answer is not None)
    most = max(votes.values(), default=0)
    winners = [answer for answer, count in votes.items() if count == most]
    return sum(answer in right for answer in winners) / len(winners) if winners else 0.0


def sizes(num_samples: int) -> list[int]:
    """The ks to report: powers of two, and all samples. 6 → 1, 2, 4, 6."""
    return sorted({1 << i for i in range(num_samples.bit_length()) if 1 << i <= num_samples} | {num_samples})


def mcnemar(num_fixed: int, num_broken: int) -> float:
    """Two-sided p of a paired comparison, exact: what only one of two models got right, as tosses of a fair coin
    (McNemar 1947, Psychometrika 12; the binomial test of Edwards 1948). 1.0 where they never differ."""
    discordant = num_fixed + num_broken
    tail = sum(math.comb(discordant, i) for i in range(min(num_fixed, num_broken) + 1))
    return min(1.0, 2 * tail / 2**discordant)
