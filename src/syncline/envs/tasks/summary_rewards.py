"""What a summary of a picture is worth: an answer of two lines, a header and one JSON object, against a reference.

    <DOMAIN=BBU>, <TASK=SUMMARY>
    {"统计": [{"类别": "标签", "文本": {"A1": 2}, "可见性": {"完整": 1}}], "备注": ["..."]}

`统计` counts, by category (`类别`) and attribute, how often each value was seen; `备注` are notes, `分组统计` counts of
groups. Of a picture with nothing to see the whole answer is `无关图片`. Each reward is a pure function of a `Reading`;
a `Reading` of an answer to another kind of task (`dense`) is worth 0 throughout.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

IRRELEVANT = "无关图片"
STATISTICS, CATEGORY, TEXT, NOTES, GROUPS = "统计", "类别", "文本", "备注", "分组统计"
DOMAINS = ("BBU", "RRU")
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

Facts = Counter[tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class Category:
    """What a summary says of one category: all of `required`, one of each group in `required_any`, nothing beyond
    `allowed`, which has the required ones anyway."""

    required: frozenset[str] = frozenset()
    required_any: tuple[frozenset[str], ...] = ()
    allowed: frozenset[str] = frozenset()

    @property
    def known(self) -> frozenset[str]:
        return self.allowed.union(self.required, *self.required_any)


@dataclass(frozen=True, slots=True)
class Schema:
    top: frozenset[str]
    categories: Mapping[str, Category]


@dataclass(frozen=True, slots=True)
class Reading:
    """An answer beside its reference. `answer` and `reference` are `None` where there is no JSON object."""

    text: str
    domain: str
    irrelevant: bool = False
    dense: bool = False
    answer: dict[str, Any] | None = None
    has_duplicates: bool = False
    reference: dict[str, Any] | None = None
    schema: Schema | None = None
    lines: tuple[str, ...] = field(default=())

    @classmethod
    def of(
        cls, text: str, reference: str, *, domain: str, dense: bool = False, schema: Schema | None = None
    ) -> "Reading":
        lines = tuple(line.strip() for line in text.strip().splitlines())
        answer, duplicates = _object(lines[1]) if len(lines) == 2 else (None, False)
        irrelevant = reference.strip() == IRRELEVANT
        meant = None if irrelevant else _object(reference)[0]
        return cls(text.strip(), domain, irrelevant, dense, answer, duplicates, meant, schema, lines)

    @property
    def header(self) -> str:
        return f"<DOMAIN={self.domain}>, <TASK=SUMMARY>"


def _object(line: str) -> tuple[dict[str, Any] | None, bool]:
    """The JSON object of a line, and whether one of its objects has a key twice."""
    twice: list[str] = []

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        twice.extend(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        return dict(pairs)

    try:
        found = json.loads(line, object_pairs_hook=unique)
    except (json.JSONDecodeError, RecursionError):
        return None, False
    return (found if isinstance(found, dict) else None), bool(twice)


def attributes(summary: Mapping[str, Any], *, texts: bool) -> dict[str, set[str]]:
    """Category → names of its attributes, with or without `文本`."""
    found: dict[str, set[str]] = {}
    for entry in _entries(summary):
        own = found.setdefault(entry[CATEGORY].strip(), set())
        own |= {name.strip() for name in entry if name != CATEGORY and (texts or name.strip() != TEXT)}
    return found


def facts(summary: Mapping[str, Any]) -> Facts:
    """`(统计, category, attribute, value)`, `(分组统计, path…)` and `(备注, note)`, each as often as counted."""
    found: Facts = Counter()
    for entry in _entries(summary):
        for name, value in entry.items():
            if name != CATEGORY:
                _count(found, (STATISTICS, entry[CATEGORY].strip(), name.strip()), value)
    if GROUPS in summary:
        _count(found, (GROUPS,), summary[GROUPS])
    if isinstance(summary.get(NOTES), list):
        _count(found, (NOTES,), summary[NOTES])
    return found


def _entries(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    statistics = summary.get(STATISTICS)
    named = statistics if isinstance(statistics, list) else []
    return [entry for entry in named if isinstance(entry, dict) and str(entry.get(CATEGORY) or "").strip()]


def _count(found: Facts, path: tuple[str, ...], value: Any) -> None:
    """A number under a value counts it; a list's members and a bare value count once."""
    if isinstance(value, dict):
        for key, below in value.items():
            if isinstance(below, int) and not isinstance(below, bool):
                found[(*path, key.strip())] += max(0, below)
            else:
                _count(found, (*path, key.strip()), below)
    elif isinstance(value, list):
        for one in value:
            _count(found, path, one)
    elif value is not None and str(value).strip():
        found[(*path, " ".join(str(value).split()))] += 1


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
    except (IndexError, json.JSONDecodeError, RecursionError):
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
    said = [entry.get(DISTANCE) for entry in _entries(answer) if entry[CATEGORY].strip() == DISTANCE]
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
