"""`syncline env new`: what it writes is short, and its own test passes."""

import subprocess
import sys
from pathlib import Path

import pytest

from syncline.cli import main


def test_new_environment_passes_its_own_test(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["env", "new", "word_sums", "--into", str(tmp_path)]) == 0
    assert "word_sums:WordSums" in capsys.readouterr().out
    assert len((tmp_path / "word_sums.py").read_text().splitlines()) <= 45
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_word_sums.py"]
    answer = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert answer.returncode == 0 and "8 passed" in answer.stdout, answer.stdout


def test_its_test_can_fail(tmp_path: Path):
    assert main(["env", "new", "sums", "--into", str(tmp_path)]) == 0
    code = tmp_path / "sums.py"
    code.write_text(code.read_text().replace("ord(letter) - ord", "ord(letter) + ord"))
    answer = subprocess.run([sys.executable, "-m", "pytest", "-q"], cwd=tmp_path, capture_output=True, text=True)
    assert answer.returncode == 1 and "test_right_beats_wrong" in answer.stdout


@pytest.mark.parametrize("words", [["Words"], ["class"], ["a b"], ["../x"], [], ["one", "two"]])
def test_unusable_name_is_refused(tmp_path: Path, words: list[str], capsys: pytest.CaptureFixture[str]):
    assert main(["env", "new", *words, "--into", str(tmp_path)]) == 2
    assert "name" in capsys.readouterr().err.lower()
    assert list(tmp_path.iterdir()) == []


def test_file_that_is_there_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "test_sums.py").write_text("mine")
    assert main(["env", "new", "sums", "--into", str(tmp_path)]) == 2
    assert "test_sums.py is there already" in capsys.readouterr().err
    assert (tmp_path / "test_sums.py").read_text() == "mine"
