"""Preference pairs from scored rollouts: right over wrong first, then more coherent over less among the right.

A pair is made inside one question, between answers to the same prompt; whatever is left out is counted by why. What
cannot be told apart by accident is an error: rollouts of two models, a trajectory there twice, no pair at all.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise, product
from statistics import fmean, median
from types import MappingProxyType
from typing import Any

from syncline.config.offline_collect import Pairs
from syncline.errors import ConfigError
from syncline.offline.records import Trajectory
from syncline.offline.regime_w import jaccard

PAIRS_FILE, HELDOUT_FILE, REPORT_FILE = "pairs.jsonl", "pairs_heldout.jsonl", "pairs_report.json"
BALANCED = (0.35, 0.65)
"""Share of pairs whose chosen answer is the longer one; outside of it, length alone is a good guess."""


@dataclass(frozen=True, slots=True)
class Pair:
    chosen: Trajectory
    rejected: Trajectory
    kind: str
    """`correctness` or `coherence`."""


@dataclass(slots=True)
class PairSet:
    train: list[Pair] = field(default_factory=list)
    heldout: list[Pair] = field(default_factory=list)
    questions: Counter[str] = field(default_factory=Counter)
    """`all`, and by what became of them."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Trajectories and candidate pairs, by why."""

    @property
    def all(self) -> list[Pair]:
        return [*self.train, *self.heldout]


Candidates = Iterable[tuple[Trajectory, Trajectory]]
Strategy = Callable[[Sequence[Trajectory], Sequence[Trajectory], Counter[str]], Candidates]
"""Right ones and wrong ones, best rewards first, and how often each wrong answer was given, near-duplicates too → the
pairs worth making, in the order in which they are."""


def nearest_length(right: Sequence[Trajectory], wrong: Sequence[Trajectory], given: Counter[str]) -> Candidates:
    """Each answer once, the most alike in length first: length then says least about which is chosen."""
    ordered = sorted(product(right, wrong), key=lambda pair: abs(pair[0].num_tokens - pair[1].num_tokens))
    used: set[str] = set()
    for chosen, rejected in ordered:
        if not used & {chosen.key, rejected.key}:
            used |= {chosen.key, rejected.key}
            yield chosen, rejected


def best_vs_worst(right: Sequence[Trajectory], wrong: Sequence[Trajectory], given: Counter[str]) -> Candidates:
    """Each answer once, from the two ends of the rewards."""
    return zip(right, reversed(wrong), strict=False)


def hard_negative(right: Sequence[Trajectory], wrong: Sequence[Trajectory], given: Counter[str]) -> Candidates:
    """Each answer once; the wrong answers that most attempts gave first."""
    return zip(right, sorted(wrong, key=lambda one: -given[one.answer]), strict=False)


def every(right: Sequence[Trajectory], wrong: Sequence[Trajectory], given: Counter[str]) -> Candidates:
    """All of them, the widest gap in reward first."""
    return sorted(product(right, wrong), key=lambda pair: pair[1].reward - pair[0].reward)


STRATEGIES: Mapping[str, Strategy] = MappingProxyType(
    {"nearest_length": nearest_length, "best_vs_worst": best_vs_worst, "hard_negative": hard_negative, "all": every}
)


def make_pairs(rollouts: Iterable[Trajectory], asked: Pairs, *, model: str | None = None) -> PairSet:
    """`model`: the digest that the rollouts must be of; absent, of any one. Raises `ConfigError`; see above."""
    found = PairSet()
    for question_id, own in _by_question(rollouts, model).items():
        found.questions["all"] += 1
        usable = [one for one in own if _is_usable(one, found.left_out)]
        pairs = list(_question_pairs(usable, asked, found.left_out))
        found.questions[_told(usable, pairs)] += 1
        (found.heldout if is_heldout(question_id, asked.heldout_fraction) else found.train).extend(pairs)
    if not found.train:
        counts = ", ".join(f"{count} {name}" for name, count in {**found.questions, **found.left_out}.items())
        where = f"; all {len(found.heldout)} are held out" if found.heldout else ""
        raise ConfigError([f"pairs: not one to train on{where} ({counts}); collect more, or loosen what is left out"])
    return found


def is_heldout(question_id: str, fraction: float) -> bool:
    """Of the question alone, so it is the same in every round and for every model."""
    return int.from_bytes(hashlib.sha256(question_id.encode()).digest()[:4]) < fraction * 2**32


def _by_question(rollouts: Iterable[Trajectory], model: str | None) -> dict[str, list[Trajectory]]:
    found: dict[str, list[Trajectory]] = defaultdict(list)
    seen: set[str] = set()
    for one in rollouts:
        model = model or one.model
        if one.model != model:
            raise ConfigError(
                [f"{one.key}: is of model {one.model[:12]}, and not of {model[:12]}; pair one's rollouts"]
            )
        if one.key in seen:
            raise ConfigError([f"{one.key}: is there twice; the question is, too, or files were joined"])
        seen.add(one.key)
        found[one.question_id].append(one)
    return found


def _is_usable(one: Trajectory, left_out: Counter[str]) -> bool:
    """A truncated answer is not a wrong one, and an empty text is none."""
    reason = None
    if one.is_twin:
        reason = "counterfactual twins"
    elif not one.text.strip():
        reason = "empty texts"
    elif one.finish_reason == "length":
        reason = "truncated"
    if reason is not None:
        left_out[reason] += 1
    return reason is None


def _question_pairs(usable: Sequence[Trajectory], asked: Pairs, left_out: Counter[str]) -> Iterator[Pair]:
    room = {"correctness": asked.max_per_question, "coherence": asked.max_coherence_per_question}
    for group in _groups(usable, across_prompts=asked.across_prompts):
        right, wrong = (_distinct(group, correct, asked.max_similarity, left_out) for correct in (True, False))
        given = Counter(one.answer for one in group if not one.correct)
        candidates = {
            "correctness": STRATEGIES[asked.strategy](right, wrong, given),
            "coherence": _by_coherence(right, asked.min_reward_gap),
        }
        for kind, pairs in candidates.items():
            for chosen, rejected in pairs:
                if similarity(chosen.text, rejected.text) > asked.max_similarity:
                    left_out["pairs too alike"] += 1
                elif room[kind] == 0:
                    left_out[f"{kind} pairs over the cap"] += 1
                else:
                    room[kind] -= 1
                    yield Pair(chosen, rejected, kind)


def _groups(usable: Sequence[Trajectory], *, across_prompts: bool) -> Iterable[list[Trajectory]]:
    """Best rewards first in each; equal ones in the order they came."""
    groups: dict[Any, list[Trajectory]] = defaultdict(list)
    for one in sorted(usable, key=lambda one: -one.reward):
        groups[None if across_prompts else one.prompt].append(one)
    return groups.values()


def _distinct(
    group: Sequence[Trajectory], correct: bool, max_similarity: float, left_out: Counter[str]
) -> list[Trajectory]:
    """Without those that nearly repeat a better one."""
    kept: list[Trajectory] = []
    for one in group:
        if one.correct == correct:
            if any(one.text == other.text or similarity(one.text, other.text) > max_similarity for other in kept):
                left_out["near-duplicates"] += 1
            else:
                kept.append(one)
    return kept


def _by_coherence(right: Sequence[Trajectory], min_gap: float) -> Candidates:
    """From the two ends of the rewards, as long as they are so far apart."""
    for best, worst in zip(right[: len(right) // 2], reversed(right), strict=False):
        if best.reward - worst.reward >= min_gap:
            yield best, worst


def similarity(a: str, b: str) -> float:
    """Jaccard of the pairs of neighbouring words; of texts of one word, of the words."""
    return jaccard(_word_pairs(a), _word_pairs(b))


def _word_pairs(text: str) -> set[Any]:
    words = text.lower().split()
    return set(pairwise(words)) or set(words)


def _told(usable: Sequence[Trajectory], pairs: Sequence[Pair]) -> str:
    if pairs:
        return "paired"
    if not usable:
        return "without a usable answer"
    correct = {one.correct for one in usable}
    return "mixed, unpaired" if len(correct) > 1 else ("all right, unpaired" if correct == {True} else "all wrong")


def record(pair: Pair, *, strategy: str) -> dict[str, Any]:
    """A line of `pairs.jsonl` (`docs/offline.md`)."""
    chosen, rejected = pair.chosen, pair.rejected
    return {
        "prompt": [message.model_dump() for message in chosen.prompt],
        "chosen": [{"role": "assistant", "content": chosen.text}],
        "rejected": [{"role": "assistant", "content": rejected.text}],
        "provenance": {
            "question_id": chosen.question_id,
            "gold": chosen.gold,
            "strategy": strategy,
            "kind": pair.kind,
            "model": chosen.model,
            "rejected_on_prompt": chosen.prompt == rejected.prompt,
            "chosen": _source(chosen),
            "rejected": _source(rejected),
        },
    }


def _source(one: Trajectory) -> dict[str, Any]:
    fields = {"key", "answer", "num_tokens", "token_ids", "logprobs", "finish_reason", "scores"}
    return one.model_dump(mode="json", include=fields)


def report(found: PairSet) -> dict[str, Any]:
    """`pairs_report.json`: counts, and how lengths compare, in tokens."""
    return {
        "pairs": {"train": len(found.train), "heldout": len(found.heldout)},
        "kinds": dict(Counter(pair.kind for pair in found.all)),
        "questions": dict(found.questions),
        "left_out": dict(found.left_out),
        "rejected_off_prompt": sum(pair.chosen.prompt != pair.rejected.prompt for pair in found.all),
        "rejected_without_answer": sum(pair.rejected.answer == "" for pair in found.all),
        "length": {
            name: _lengths([pair for pair in found.all if name in ("all", pair.kind)])
            for name in ("all", "correctness", "coherence")
        },
    }


def _lengths(pairs: Sequence[Pair]) -> dict[str, float | bool] | None:
    if not pairs:
        return None
    differences = [pair.chosen.num_tokens - pair.rejected.num_tokens for pair in pairs]
    longer = fmean((difference > 0) + 0.5 * (difference == 0) for difference in differences)
    return {
        "chosen_mean": fmean(pair.chosen.num_tokens for pair in pairs),
        "rejected_mean": fmean(pair.rejected.num_tokens for pair in pairs),
        "median_difference": median(differences),
        "chosen_longer": longer,
        "balanced": BALANCED[0] <= longer <= BALANCED[1],
    }
