"""Printing into a pipe that nobody reads any more, as `| head` leaves it, ends a command without a traceback."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import pytest

from syncline.cli import READER_LEFT, main


@pytest.fixture
def closed() -> Iterator[TextIO]:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as stream:
        yield stream


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "run.yaml"
    path.write_text(
        "run: {dir: x, num_steps: 1, groups_per_step: 1}\nmodel: {path: m, max_length: 64}\n"
        "sampling: {max_tokens: 8}\nenvironments: [{task: arithmetic}]\n"
    )
    return str(path)


def test_a_closed_pipe_ends_a_command_as_its_signal_would(
    closed: TextIO, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", closed)
    assert main(["check", file]) == READER_LEFT


def test_nothing_is_said_of_it(closed: TextIO, file: str) -> None:
    answer = subprocess.run(
        [sys.executable, "-m", "syncline", "check", file],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=closed,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert (answer.returncode, answer.stderr) == (READER_LEFT, "")


def test_another_broken_connection_is_not_taken_for_it(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(config: object) -> str:
        raise BrokenPipeError("a socket")

    monkeypatch.setattr("syncline.cli.check.config_text", broken)
    with pytest.raises(BrokenPipeError, match="a socket"):
        main(["check", file])
