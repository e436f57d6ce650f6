"""An answer that sums up a picture, read beside its reference: two lines, a header and one JSON object.

    <DOMAIN=BBU>, <TASK=SUMMARY>
    {"统计": [{"类别": "标签", "文本": {"A1": 2}, "可见性": {"完整": 1}}], "备注": ["..."]}

`统计` counts, by category (`类别`) and attribute, how often each value was seen; `备注` are notes, `分组统计` counts of
groups. Of a picture with nothing to see the whole answer is `无关图片`.
"""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

IRRELEVANT = "无关图片"
STATISTICS, CATEGORY, TEXT, NOTES, GROUPS = "统计", "类别", "文本", "备注", "分组统计"
DOMAINS = ("BBU", "RRU")

MOST = 1 << 53
"""Of anything seen: a count is reckoned with as a float."""
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
    except (ValueError, RecursionError):  # no JSON, or a number longer than Python reads
        return None, False
    return (found if isinstance(found, dict) else None), bool(twice)


def attributes(summary: Mapping[str, Any], *, texts: bool) -> dict[str, set[str]]:
    """Category → names of its attributes, with or without `文本`."""
    found: dict[str, set[str]] = {}
    for entry in entries(summary):
        own = found.setdefault(entry[CATEGORY], set())
        own |= {name.strip() for name in entry if name != CATEGORY and (texts or name.strip() != TEXT)}
    return found


def facts(summary: Mapping[str, Any]) -> Facts:
    """`(统计, category, attribute, value)`, `(分组统计, path…)` and `(备注, note)`, each as often as counted."""
    found: Facts = Counter()
    for entry in entries(summary):
        for name, value in entry.items():
            if name != CATEGORY:
                _count(found, (STATISTICS, entry[CATEGORY], name.strip()), value)
    if GROUPS in summary:
        _count(found, (GROUPS,), summary[GROUPS])
    if isinstance(summary.get(NOTES), list):
        _count(found, (NOTES,), summary[NOTES])
    return found


def entries(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    statistics = summary.get(STATISTICS)
    named = statistics if isinstance(statistics, list) else []
    found = [(entry, str(entry.get(CATEGORY) or "").strip()) for entry in named if isinstance(entry, dict)]
    return [{**entry, CATEGORY: category} for entry, category in found if category]


def _count(found: Facts, path: tuple[str, ...], value: Any) -> None:
    """A number under a value counts it; a list's members and a bare value count once."""
    if isinstance(value, dict):
        for key, below in value.items():
            if isinstance(below, int) and not isinstance(below, bool):
                found[(*path, key.strip())] += min(max(0, below), MOST)
            else:
                _count(found, (*path, key.strip()), below)
    elif isinstance(value, list):
        for one in value:
            _count(found, path, one)
    elif value is not None and str(value).strip():
        found[(*path, " ".join(str(value).split()))] += 1
