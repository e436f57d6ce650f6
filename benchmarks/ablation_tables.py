"""The tables of `coherence_ablation.py`: what each way to prefer changes, question by question, with intervals."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np

from syncline.envs.estimators import mcnemar, wilson

BASELINE, PLACEBO = "correctness", "placebo"
NUM_RESAMPLES = 4000


@dataclass(frozen=True, slots=True)
class Read:
    """An evaluation, by question id. All but `greedy` are means over a question's samples."""

    greedy: dict[str, float]
    sampled: dict[str, float]
    coherence: dict[str, float]
    steps: dict[str, float]
    tokens: dict[str, float]


@dataclass(frozen=True, slots=True)
class Outcome:
    way: str
    seed: int
    pairs: Mapping[str, int]
    read: Read


def means(base: Read, outcomes: Sequence[Outcome], ways: Sequence[str]) -> Iterator[str]:
    """Means over seeds."""
    columns = ("preferences", "right > wrong", "right > right", "other pairs", *Read.__slots__)
    yield f"| {' | '.join(columns)} |"
    yield "|---" * len(columns) + "|"
    yield f"| the model before | | | | {' | '.join(cells([base]))} |"
    for way in ways:
        own = [one for one in outcomes if one.way == way]
        names = ("right_over_wrong", "right_over_right", "other_pairs")
        counts = [f"{fmean(one.pairs[name] for one in own):.0f}" for name in names]
        yield f"| {way} | {' | '.join([*counts, *cells([one.read for one in own])])} |"


def cells(reads: Sequence[Read]) -> list[str]:
    """With Wilson's interval, as of one seed: the seeds' questions are the same."""
    shares = [fmean(fmean(getattr(one, name).values()) for one in reads) for name in Read.__slots__]
    size = len(reads[0].greedy)
    intervals = [wilson(share * size, size) for share in shares[:2]]
    told = [f"{share:.3f} [{low:.3f}, {high:.3f}]" for share, (low, high) in zip(shares, intervals, strict=False)]
    return [*told, f"{shares[2]:.3f}", f"{shares[3]:.3f}", f"{shares[4]:.2f}"]


def compared(outcomes: Sequence[Outcome], ways: Sequence[str], against: str) -> Iterator[str]:
    """Each way minus another one of the same seed."""
    baseline = {one.seed: one.read for one in outcomes if one.way == against}
    names = ("sampled", "coherence", "steps", "tokens")
    yield f"| minus {against} | {' | '.join(names)} | greedy: fixed, broken, McNemar's p, by seed |"
    yield "|---" * (len(names) + 2) + "|"
    for way in ways:
        own = [one for one in outcomes if one.way == way]
        found = [difference([(baseline[one.seed], one.read) for one in own], name) for name in names]
        tests = [mcnemar_told(baseline[one.seed].greedy, one.read.greedy) for one in own]
        yield f"| {way} | {' | '.join(found)} | {'; '.join(tests)} |"


def difference(pairs: Sequence[tuple[Read, Read]], name: str) -> str:
    """Mean over seeds and questions, its interval, and each seed's mean."""
    rows = [[getattr(b, name)[key] - getattr(a, name)[key] for key in getattr(a, name)] for a, b in pairs]
    values = np.array(rows)  # [seeds, questions]
    drawn = np.random.default_rng(0).integers(values.shape[1], size=(NUM_RESAMPLES, values.shape[1]))
    low, high = np.quantile(values.mean(0)[drawn].mean(1), [0.025, 0.975])
    seeds = " ".join(f"{value:+.3f}" for value in values.mean(1))
    return f"{values.mean():+.3f} [{low:+.3f}, {high:+.3f}] ({seeds})"


def mcnemar_told(before: Mapping[str, float], after: Mapping[str, float]) -> str:
    fixed = sum(after[key] > before[key] for key in before)
    broken = sum(after[key] < before[key] for key in before)
    return f"{fixed}, {broken}, {mcnemar(fixed, broken):.2g}"
