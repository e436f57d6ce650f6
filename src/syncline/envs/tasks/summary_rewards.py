"""What an answer that sums up a picture is worth, reward by reward: each a pure function of a `Reading`.

An answer to another kind of task (`dense`) is worth 0 throughout.
"""

import json
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

from syncline.envs.tasks.summary_reading import (
    CATEGORY,
    DOMAINS,
    GROUPS,
    IRRELEVANT,
    NOTES,
    STATISTICS,
    TEXT,
    Category,
    Facts,
    Reading,
    attributes,
    entries,
    facts,
)

STABLE_ATTRIBUTES = frozenset(
    ["捆扎", "可见性", "符合性", "弯曲半径", "套管保护", "保护", "保护措施", "位置", "安装状态", "方向", "安装方向"]
)
"""Whose values are words of a fixed list, so that they can be asked for."""
DISTANCE = "站点距离"
"""A category of RRU whose values are digits alone."""
LONGEST_VALUE = 32
TVERSKY_ALPHA = {"BBU": 0.30, "RRU": 0.60}
"""What a fact too much costs, a fact too few being 1 (Tversky 1977, "Features of similarity", eq. 1)."""
FREE_TEXTS, TEXT_PENALTY = 2, 0.1
EXTRA_ATTRIBUTES, EXTRA_CATEGORIES, EXTRA_TOP, NO_DIGITS = 0.35, 0.25, 0.30, 0.60
"""What `schema_tree` takes off for each kind of fault."""


def tversky(answer: Facts, reference: Facts, *, alpha: float, beta: float) -> float:
    """Shared / (shared + alpha · too many + beta · too few); two empty ones are alike."""
    shared = (answer & reference).total()
    whole = shared + alpha * (answer - reference).total() + beta * (reference - answer).total()
    return shared / whole if whole else 1.0


def recall(answer: set[Any], reference: set[Any]) -> float:
    """Of nothing to find: 1 if nothing was said."""
    return len(answer & reference) / len(reference) if reference else float(not answer)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _format(r: Reading) -> float:
    if r.irrelevant:
        return float(r.text == IRRELEVANT)
    known = re.fullmatch(rf"<DOMAIN=({'|'.join(DOMAINS)})>, <TASK=SUMMARY>", r.lines[0]) if r.lines else None
    return float(len(r.lines) == 2 and known is not None and r.lines[1].endswith("}"))


def _header(r: Reading) -> float:
    if r.irrelevant:
        return -1.0 if r.text.startswith("<DOMAIN=") or "<TASK=" in r.text else 0.0
    return float(r.lines[:1] == (r.header,))


def _strict(r: Reading) -> float:
    return 0.0 if len(r.lines) == 2 and r.lines[0] == r.header else -1.0


def _parse(r: Reading) -> float:
    try:
        json.loads(r.lines[1])
    except (IndexError, ValueError, RecursionError):
        return -1.0
    return 0.0


def _dataset(r: Reading) -> float:
    return float(r.answer is not None and r.lines[0].startswith(f"<DOMAIN={r.domain}>"))


Pair = Callable[[Reading, dict[str, Any], dict[str, Any]], float]


def _of_both(reward: Pair) -> Callable[[Reading], float]:
    """0 unless both answer and reference are JSON objects."""

    def rewarded(r: Reading) -> float:
        return 0.0 if r.answer is None or r.reference is None else reward(r, r.answer, r.reference)

    return rewarded


def _category_recall(r: Reading, answer: dict[str, Any], reference: dict[str, Any]) -> float:
    return recall(set(attributes(answer, texts=True)), set(attributes(reference, texts=True)))


def _category_f1(r: Reading, answer: dict[str, Any], reference: dict[str, Any]) -> float:
    said, meant = (Counter((name,) for name in attributes(one, texts=True)) for one in (answer, reference))
    return tversky(said, meant, alpha=0.5, beta=0.5)


def _attr_key_recall(r: Reading, answer: dict[str, Any], reference: dict[str, Any]) -> float:
    """By category, so that a small one's missing attribute is not drowned by a large one's many."""
    said, meant = attributes(answer, texts=False), attributes(reference, texts=False)
    asked = {category: names for category, names in meant.items() if names}
    if not asked:
        return float(not said)
    return _mean([recall(said.get(category, set()), names) for category, names in asked.items()])


def _attr_path_recall(r: Reading, answer: dict[str, Any], reference: dict[str, Any]) -> float:
    said, meant = _paths(answer), _paths(reference)
    both = attributes(answer, texts=True).keys() & meant.keys()
    return _mean([recall(said.get(category, set()), meant[category]) for category in both])


def _paths(summary: dict[str, Any]) -> dict[str, set[tuple[str, str]]]:
    """Category → (attribute, value) of the stable attributes, values that look like something read off left out."""
    found: dict[str, set[tuple[str, str]]] = {}
    for path in facts(summary):
        if len(path) == 4 and path[0] == STATISTICS and path[2] in STABLE_ATTRIBUTES:
            _, category, attribute, value = path
            if value and not value.isdigit() and "=" not in value and len(value) <= LONGEST_VALUE:
                found.setdefault(category, set()).add((attribute, value))
    return found


def _schema_tree(r: Reading, answer: dict[str, Any], reference: dict[str, Any]) -> float:
    if r.schema is None:
        return 0.0
    said, meant = attributes(answer, texts=True), attributes(reference, texts=True)
    known = [(said[name], r.schema.categories[name]) for name in said if name in meant and name in r.schema.categories]
    if not known:
        return 0.0
    extra_top = len(answer.keys() - r.schema.top) / max(1, len(r.schema.top))
    score = _mean([_completeness(names, category) for names, category in known])
    score -= EXTRA_ATTRIBUTES * _mean([_excess(names, category) for names, category in known])
    score -= EXTRA_CATEGORIES * len(said.keys() - meant.keys()) / len(meant)
    score -= EXTRA_TOP * extra_top
    score -= NO_DIGITS * (r.domain == "RRU" and DISTANCE in said and DISTANCE in meant and not _in_digits(answer))
    return max(-1.0, min(1.0, score))


def _completeness(names: set[str], category: Category) -> float:
    hits = len(names & category.required) + sum(bool(names & group) for group in category.required_any)
    asked = len(category.required) + len(category.required_any)
    return hits / asked if asked else 1.0


def _excess(names: set[str], category: Category) -> float:
    return min(1.0, len(names - category.known) / max(1, len(category.known)))


def _in_digits(answer: dict[str, Any]) -> bool:
    said = [entry.get(DISTANCE) for entry in entries(answer) if entry[CATEGORY] == DISTANCE]
    return all(isinstance(one, dict) and all(str(key).strip().isdigit() for key in one) for one in said)


def _content_tversky(r: Reading, answer: dict[str, Any], reference: dict[str, Any]) -> float:
    """Notes left out, and of BBU texts too, which `text_bbu` judges."""

    def counted(summary: dict[str, Any]) -> Facts:
        found = {path: count for path, count in facts(summary).items() if path[0] != NOTES}
        return Counter({path: n for path, n in found.items() if r.domain != "BBU" or path[2:3] != (TEXT,)})

    return tversky(counted(answer), counted(reference), alpha=TVERSKY_ALPHA[r.domain], beta=1.0)


def _content_f1(r: Reading, answer: dict[str, Any], reference: dict[str, Any]) -> float:
    return tversky(facts(answer), facts(reference), alpha=0.5, beta=0.5)


def _content_eq(r: Reading, answer: dict[str, Any], reference: dict[str, Any]) -> float:
    """Whatever the order of keys, categories and notes."""
    same = facts(answer) == facts(reference) and attributes(answer, texts=True) == attributes(reference, texts=True)
    return float(same and answer.keys() == reference.keys())


def _text_bbu(r: Reading, answer: dict[str, Any], reference: dict[str, Any]) -> float:
    if r.domain != "BBU":
        return 0.0
    said, meant = _texts(answer), _texts(reference)
    found = (said & meant).total() / meant.total() if meant else 0.0
    return max(-1.0, found - TEXT_PENALTY * max(0, len(said) - len(meant) - FREE_TEXTS))


def _texts(summary: dict[str, Any]) -> Counter[str]:
    found: Counter[str] = Counter()
    for path, count in facts(summary).items():
        if path[0] == STATISTICS and path[2] == TEXT and len(path) == 4:
            found["".join(path[3].split())] += count
    return found


def _notes_bbu(r: Reading, answer: dict[str, Any], reference: dict[str, Any]) -> float:
    if r.domain != "BBU":
        return 0.0
    said, meant = ({path for path in facts(one) if path[0] == NOTES} for one in (answer, reference))
    return recall(said, meant) if meant else -float(bool(said))


def _presence(key: str) -> Pair:
    """Said where the reference says it, and not where it does not."""

    def present(r: Reading, answer: dict[str, Any], reference: dict[str, Any]) -> float:
        return float((key in answer) == (key in reference))

    return present


_ALWAYS = {"format": _format, "header": _header}
"""The ones that say something of an irrelevant picture too; of such a picture all others are 0."""
_OF_ANSWER: dict[str, Callable[[Reading], float]] = {
    "strict": _strict,
    "parse": _parse,
    "no_dup_keys": lambda r: -float(r.has_duplicates),
    "dataset": _dataset,
    "category_recall": _of_both(_category_recall),
    "category_f1": _of_both(_category_f1),
    "attr_key_recall": _of_both(_attr_key_recall),
    "attr_path_recall": _of_both(_attr_path_recall),
    "schema_tree": _of_both(_schema_tree),
    "content_structured_tversky": _of_both(_content_tversky),
    "content_f1": _of_both(_content_f1),
    "content_eq": _of_both(_content_eq),
    "text_bbu": _of_both(_text_bbu),
    "notes_bbu": _of_both(_notes_bbu),
    "notes_presence": _of_both(_presence(NOTES)),
    "group_stats_presence": _of_both(_presence(GROUPS)),
}
REWARDS = (*_ALWAYS, *_OF_ANSWER)


def rewards(reading: Reading) -> dict[str, float]:
    """Every reward by its name."""
    if reading.dense:
        return dict.fromkeys(REWARDS, 0.0)
    of_answer = dict.fromkeys(_OF_ANSWER, 0.0) if reading.irrelevant else {n: f(reading) for n, f in _OF_ANSWER.items()}
    return {name: reward(reading) for name, reward in _ALWAYS.items()} | of_answer
