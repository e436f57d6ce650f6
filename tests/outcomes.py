"""What every test came to, told as it ends: for two tables at the session's end, and for whoever stops a suite early.

`--outcomes FILE` appends a JSON line for each test that ended: its name, outcome, seconds, the first line of what
failed, and its rows of the tables. The table of contracts: a suite says its row by the mark
`contract(bridge, tensor_parallel)`. The table of chaos: a test that did harm says by the fixture `noticed` which, to
which bridge, and what whoever noticed said.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest

COUNTED = ("passed", "failed", "skipped")
MESSAGE_WIDTH = 160
Noticed = Callable[..., None]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--outcomes", type=Path, help="append a JSON line for each test that ended to this file")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "contract(bridge, tensor_parallel): the table's row this test counts in")
    config.pluginmanager.register(Outcomes(config.getoption("--outcomes")))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    if mark := item.get_closest_marker("contract"):
        bridge, tensor_parallel = mark.args
        row = {"bridge": bridge, "device": device_name(), "tensor_parallel": tensor_parallel}
        item.user_properties.append(("contract", row))


@pytest.fixture
def noticed(request: pytest.FixtureRequest) -> Noticed:
    """`noticed(fault, bridge, by=..., told=...)`: a row of the table of chaos; `told` is an error, or its words."""
    rows: list[dict[str, str]] = []
    request.node.user_properties.append(("chaos", rows))

    def add(fault: str, bridge: str, *, by: str, told: object) -> None:
        rows.append({"fault": fault, "bridge": bridge, "by": by, "told": _in_one_line(str(told))})

    return add


def _in_one_line(text: str) -> str:
    """Without what differs from run to run."""
    text = re.sub(r"http://127\.0\.0\.1:\d+", "URL", " ".join(text.split()))
    text = re.sub(r"\b[0-9a-f]{12,}\b", "…", text)
    return text if len(text) <= MESSAGE_WIDTH else text[: MESSAGE_WIDTH - 1] + "…"


def device_name() -> str:
    """The device that the tests' engines run on, and their vLLM."""
    from importlib.metadata import packages_distributions, version

    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return f"{device}, vLLM {version(packages_distributions()['vllm'][0]).partition('+')[0]}"


class Outcomes:
    """Listens to the session's reports."""

    def __init__(self, file: Path | None) -> None:
        self._file = file
        self._phases: dict[str, list[pytest.TestReport]] = {}
        self._lines: list[dict[str, Any]] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        phases = self._phases.setdefault(report.nodeid, [])
        phases.append(report)
        if report.when == "teardown":
            line = line_of(self._phases.pop(report.nodeid))
            self._lines.append(line)
            if self._file is not None:
                with self._file.open("a") as file:
                    file.write(json.dumps(line) + "\n")

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        for title, rows in (("contracts", contract_rows(self._lines)), ("chaos", chaos_rows(self._lines))):
            if len(rows) > 1:
                terminalreporter.section(title)
                terminalreporter.write_line(table(rows))


def line_of(phases: Sequence[pytest.TestReport]) -> dict[str, Any]:
    """One test's setup, call and teardown as what is written of it."""
    told = next((p for p in phases if p.failed), None) or next((p for p in phases if p.skipped), None) or phases[-1]
    return {
        "test": told.nodeid,
        "outcome": told.outcome,
        "seconds": round(sum(phase.duration for phase in phases), 2),
        "message": first_line(told.longrepr) if told.failed else "",
        **dict(phases[-1].user_properties),
    }


def first_line(longrepr: Any) -> str:
    crash = getattr(longrepr, "reprcrash", None)
    text = crash.message if crash else str(longrepr)
    return next(iter(text.strip().splitlines()), "")


def contract_rows(lines: Iterable[dict[str, Any]]) -> list[list[str]]:
    """Bridge × device × tensor parallel; the first row holds the columns' names."""
    counts: dict[tuple, Counter[str]] = {}
    for line in lines:
        if row := line.get("contract"):
            counts.setdefault((row["bridge"], row["device"], row["tensor_parallel"]), Counter())[line["outcome"]] += 1
    head = ["bridge", "device", "TP", *COUNTED]
    return [head] + [[*map(str, key), *(str(n[k]) for k in COUNTED)] for key, n in sorted(counts.items())]


def chaos_rows(lines: Iterable[dict[str, Any]]) -> list[list[str]]:
    """Fault × bridge → who noticed, and what was said; of tests that passed, faults in the order they came."""
    rows = [row for line in lines if line["outcome"] == "passed" for row in line.get("chaos", [])]
    order = {fault: i for i, fault in enumerate(dict.fromkeys(row["fault"] for row in rows))}
    rows.sort(key=lambda row: (order[row["fault"]], row["bridge"]))
    keys = ("fault", "bridge", "by", "told")
    return [["fault", "bridge", "noticed by", "told"]] + [[row[key].replace("|", "/") for key in keys] for row in rows]


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows as Markdown, the first of them the head; columns aligned for who reads it in a terminal."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])
