"""What every test came to, told as it ends: for the table of contracts, and for whoever stops a suite half-way.

`--outcomes FILE` appends a JSON line for each test that ended: its name, outcome, seconds, the first line of what
failed, and its row of the table. A suite says its row by the mark `contract(bridge, tensor_parallel)`; the table of the
session is printed at its end.
"""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest

COUNTED = ("passed", "failed", "skipped")


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
        for title, rows in (("contracts", contract_rows(self._lines)),):
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


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows as Markdown, the first of them the head; columns aligned for who reads it in a terminal."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])
