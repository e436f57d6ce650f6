"""Following files that grow, are cut, or are not there yet."""

from pathlib import Path

import pytest

from syncline.observe.files import LineFollower, last_lines, loop_tokens_per_second, read_lines, write_atomically


def append(path: Path, data: bytes) -> None:
    with path.open("ab") as file:
        file.write(data)


def test_lines_come_once_and_whole(tmp_path: Path) -> None:
    path = tmp_path / "log"
    follower = LineFollower(path)
    assert follower.poll() == []
    append(path, b"one\ntw")
    assert follower.poll() == ["one"]
    append(path, "o é".encode()[:-1])
    assert follower.poll() == []
    append(path, "é".encode()[1:] + b"\r\n\xff\n")
    assert follower.poll() == ["two é", "\\xff"]
    append(path, b"last words")
    assert follower.rest() == ["last words"]
    assert follower.rest() == []


def test_following_from_the_end_leaves_out_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "log"
    append(path, b"earlier run\n")
    follower = LineFollower(path, from_end=True)
    append(path, b"this run\n")
    assert follower.poll() == ["this run"]


def test_a_cut_file_is_followed_from_its_new_end(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    append(path, b"1\n2\n3\n")
    follower = LineFollower(path)
    assert follower.poll() == ["1", "2", "3"]
    path.write_bytes(b"1\n")
    assert follower.poll() == []
    append(path, b"2 again\n")
    assert follower.poll() == ["2 again"]


def test_the_end_of_a_long_log(tmp_path: Path) -> None:
    path = tmp_path / "log"
    append(path, b"x" * 100_000 + b"\n\nbefore\nlast")
    assert last_lines(path, 2) == ["before", "last"]
    assert last_lines(tmp_path / "missing", 2) == []


def test_a_line_being_written_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "m").write_text('{"step": 1}\n{"st')
    assert read_lines(tmp_path / "m") == [{"step": 1}]


def test_an_atomic_write_leaves_no_other_file(tmp_path: Path) -> None:
    write_atomically(tmp_path / "new/x.json", "1")
    write_atomically(tmp_path / "new/x.json", "2")
    assert {path.name: path.read_text() for path in (tmp_path / "new").iterdir()} == {"x.json": "2"}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"tokens/sampled": 600, "time/step_seconds": 1.5}, 400.0),
        ({"tokens/sampled": 600}, None),
        ({"tokens/sampled": 600, "time/step_seconds": 0.0}, None),
    ],
)
def test_throughput_of_the_whole_loop(row: dict, expected: float | None) -> None:
    assert loop_tokens_per_second(row) == expected
