"""Stages: skipped when complete, gone on with when interrupted, worked on by one process at a time."""

import fcntl
import json
from itertools import count
from pathlib import Path

import pytest

from syncline.errors import CheckpointError, ConfigError
from syncline.offline.stage import LOCK_FILE, MANIFEST_FILE, Notes, Stage, finished, run_stage, tokenizer_digest

STAGE = Stage("pairs", {"seed": 3}, {"rollouts": "sha256:00"})


def lines_of(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def five_lines(notes: Notes, *, dies_after: int = 5) -> None:
    """Writes what is missing, as a stage that appends does."""
    path = notes.folder / "lines.txt"
    for i in range(len(lines_of(path)), 5):
        if i == dies_after:
            raise RuntimeError("killed")
        with path.open("a") as file:
            file.write(f"{i}\n")
        notes.tokens += 10


def test_an_interrupted_stage_goes_on_where_it_was_and_a_complete_one_is_skipped(tmp_path: Path) -> None:
    ticks = count(100.0, 2.0)
    with pytest.raises(RuntimeError):
        run_stage(tmp_path, STAGE, lambda n: five_lines(n, dies_after=2), outputs=("lines.txt",), clock=ticks.__next__)
    assert json.loads((STAGE.folder(tmp_path) / MANIFEST_FILE).read_text())["state"] == "running"
    assert finished(tmp_path, STAGE) is None

    done = run_stage(tmp_path, STAGE, five_lines, outputs=("lines.txt",), clock=ticks.__next__)
    assert lines_of(done.folder / "lines.txt") == ["0", "1", "2", "3", "4"]
    assert (done.manifest["tokens"], done.manifest["seconds"], len(done.manifest["attempts"])) == (50, 4.0, 2)

    def never(notes: Notes) -> None:
        raise AssertionError("a complete stage is not done again")

    assert run_stage(tmp_path, STAGE, never, outputs=("lines.txt",)).manifest == done.manifest


def test_another_seed_or_input_is_another_stage(tmp_path: Path) -> None:
    others = [
        Stage("pairs", {"seed": 4}, STAGE.inputs),
        Stage("pairs", STAGE.config, {"rollouts": "sha256:01"}),
        Stage("dpo", STAGE.config, STAGE.inputs),
    ]
    assert len({stage.folder(tmp_path) for stage in [STAGE, *others]}) == 4
    assert Stage("pairs", {"seed": 3}, dict(STAGE.inputs)).folder(tmp_path) == STAGE.folder(tmp_path)


def test_a_tokenizer_is_known_by_what_it_says_and_not_by_where_it_lies(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there):
        folder.mkdir()
        (folder / "tokenizer.json").write_text("{}")
    (there / "model.safetensors").write_text("weights have a digest of their own")
    assert tokenizer_digest(str(here)) == tokenizer_digest(str(there))
    (there / "chat_template.jinja").write_text("{{ messages }}")
    assert tokenizer_digest(str(here)) != tokenizer_digest(str(there))
    assert tokenizer_digest("somebody/model") == "somebody/model"


def test_an_output_that_was_changed_is_named(tmp_path: Path) -> None:
    done = run_stage(tmp_path, STAGE, five_lines, outputs=("lines.txt",))
    (done.folder / "lines.txt").write_text("0\n")
    with pytest.raises(CheckpointError, match=r"lines\.txt: was changed after it was written; remove"):
        finished(tmp_path, STAGE)


def test_an_output_that_was_not_written_leaves_the_stage_running(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"other\.txt: was not written"):
        run_stage(tmp_path, STAGE, five_lines, outputs=("lines.txt", "other.txt"))
    assert finished(tmp_path, STAGE) is None


def test_a_stage_that_another_process_works_on_is_refused_with_its_pid(tmp_path: Path) -> None:
    folder = STAGE.folder(tmp_path)
    folder.mkdir()
    with (folder / LOCK_FILE).open("w") as lock:
        lock.write("4711")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="worked on by the process 4711"):
            run_stage(tmp_path, STAGE, five_lines, outputs=("lines.txt",))
    assert run_stage(tmp_path, STAGE, five_lines, outputs=("lines.txt",)).manifest["state"] == "complete"
