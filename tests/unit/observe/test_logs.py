"""Logs of several processes on one terminal, each line under its process's name."""

import logging
from pathlib import Path

import pytest

from syncline.observe.logs import LogTail, log_path, set_up_logging


@pytest.fixture
def root_logger():
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield root
    root.handlers[:] = handlers
    root.setLevel(level)


def test_format(root_logger: logging.Logger, capsys: pytest.CaptureFixture[str]) -> None:
    set_up_logging()
    set_up_logging()
    logging.getLogger("syncline.train").info("step %d", 3)
    logging.getLogger("syncline.train").debug("not shown")
    (line,) = capsys.readouterr().err.splitlines()
    time, level, name, message = line.split(" | ")
    assert (level, name, message) == ("INFO", "syncline.train", "step 3")
    assert time[:2] == "20"


def test_names_of_log_files() -> None:
    assert log_path(Path("runs/x"), "env:arithmetic") == Path("runs/x/logs/env-arithmetic.log")
    assert log_path(Path("runs/x"), "env:my/own") == Path("runs/x/logs/env-my-own.log")


def test_lines_carry_their_process(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("an earlier run\n")
    tail = LogTail(["engine", "env:sums"])
    tail.follow("engine", tmp_path / "a")
    tail.follow("env:sums", tmp_path / "b")
    with (tmp_path / "a").open("a") as a, (tmp_path / "b").open("a") as b:
        a.write("loading\nready")
        b.write("sampling\n")
    assert tail.poll() == ["engine   | loading", "env:sums | sampling"]
    assert tail.finish("engine") == ["engine   | ready"]
    assert tail.finish("engine") == []
