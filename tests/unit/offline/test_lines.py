"""What is on disk after a crash is what `append` returned from, once."""

from collections.abc import Callable
from pathlib import Path

import pytest

from syncline.envs.rows import file_rows
from syncline.errors import ConfigError
from syncline.offline.lines import AppendOnlyLines, read_records


def test_what_was_appended_is_done_when_opened_again(tmp_path: Path) -> None:
    path = tmp_path / "new" / "attempts.jsonl"
    with AppendOnlyLines(path, key="key") as lines:
        lines.append({"key": "a", "n": 1}, {"key": "b", "n": 2})
        lines.append({"key": "c", "n": 3})
    with AppendOnlyLines(path, key=lambda record: f"<{record['key']}>") as lines:
        assert lines.done == {"<a>", "<b>", "<c>"}
    assert [record["n"] for _, record in read_records(path)] == [1, 2, 3]


def test_append_is_on_disk_before_it_returns(tmp_path: Path) -> None:
    with AppendOnlyLines(tmp_path / "x.jsonl", key="key") as lines:
        lines.append({"key": "a"})
        assert (tmp_path / "x.jsonl").read_text() == '{"key": "a"}\n'


@pytest.mark.parametrize("torn", ['{"key": "b", "text": "ha', '{"key": "b"}'])
def test_a_torn_last_line_is_cut_and_its_work_is_not_done(tmp_path: Path, torn: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"key": "a"}\n' + torn)
    with AppendOnlyLines(path, key="key") as lines:
        assert lines.done == {"a"}
        lines.append({"key": "b"})
    assert path.read_text() == '{"key": "a"}\n{"key": "b"}\n'


def test_a_key_is_written_once(tmp_path: Path) -> None:
    with AppendOnlyLines(tmp_path / "x.jsonl", key="key") as lines:
        lines.append({"key": "a"})
        for records in ([{"key": "a"}], [{"key": "b"}, {"key": "b"}]):
            with pytest.raises(ValueError, match="is there already"):
                lines.append(*records)
    assert (tmp_path / "x.jsonl").read_text() == '{"key": "a"}\n'


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"key": "a"}\nnonsense\n{"key": "b"}\n', r"x\.jsonl:2: is not JSON"),
        ("[1]\n", r"x\.jsonl:1: holds a list"),
        ('{"key": "a"}\n{"key": "a"}\n', r"x\.jsonl:2: 'a' is there twice"),
        ('{"key": "a"}\n{"kye": "b"}\n', r"x\.jsonl:2: has no 'key'"),
        ('{"key": "a"}\n\udcff\n', r"x\.jsonl:2: is not JSON"),
        ('{"key": ' + "9" * 5000 + "}\n", r"x\.jsonl:1: is not JSON"),
        ("[" * 100_000 + "\n", r"x\.jsonl:1: is not JSON"),
    ],
)
def test_a_spoilt_file_is_refused_by_line(tmp_path: Path, text: str, said: str) -> None:
    content = text.encode(errors="surrogateescape")
    (tmp_path / "x.jsonl").write_bytes(content)
    with pytest.raises(ConfigError, match=said), AppendOnlyLines(tmp_path / "x.jsonl", key="key"):
        pass
    assert (tmp_path / "x.jsonl").read_bytes() == content


@pytest.mark.parametrize("read", [read_records, lambda path: file_rows(str(path))])
@pytest.mark.parametrize("text", ["[" * 100_000, '{"n": ' + "9" * 5000 + "}"])
def test_what_json_itself_cannot_read_is_refused_by_line(tmp_path: Path, text: str, read: Callable) -> None:
    (tmp_path / "x.jsonl").write_text('{"n": 1}\n' + text + "\n")
    with pytest.raises(ConfigError, match=r"x\.jsonl:2: is not JSON"):
        list(read(tmp_path / "x.jsonl"))


def test_a_byte_order_mark_of_another_tool_is_no_fault(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(b'\xef\xbb\xbf{"n": 1}\r\n{"n": 2}')
    assert [record["n"] for _, record in read_records(tmp_path / "x.jsonl")] == [1, 2]


def test_two_writers_are_refused(tmp_path: Path) -> None:
    with (
        AppendOnlyLines(tmp_path / "x.jsonl", key="key"),
        pytest.raises(ConfigError, match="another process appends"),
        AppendOnlyLines(tmp_path / "x.jsonl", key="key"),
    ):
        pass
