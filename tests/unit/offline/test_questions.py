"""Rows of a file become questions, or an error that names the row."""

import json
from pathlib import Path
from typing import Any

import pytest

from syncline.config.offline_collect import Questions
from syncline.errors import ConfigError
from syncline.offline.questions import Loaded, load_questions


def load(folder: Path, rows: list[Any], **asked: Any) -> Loaded:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_questions(Questions(path=str(folder / "rows.jsonl"), **asked), seed=0, heldout=False)


def test_duplicates_are_left_out_and_counted(tmp_path: Path) -> None:
    rows = [{"question": q, "answer": f"so it is\n#### {a}"} for q, a in (("a", "1,875"), ("b", "2"), ("a ", "3"))]
    found = load(tmp_path, [*rows, {"question": "c", "answer": "4.5", "cleaning_status": "clean"}])
    assert [(q.question, q.gold) for q in found.questions] == [("a", "1,875"), ("b", "2"), ("c", "4.5")]
    assert found.num_duplicates == 1
    assert [q.question for q in load(tmp_path, rows, num_questions=2).questions] == ["a", "b"]


def test_a_line_ends_where_json_lines_do(tmp_path: Path) -> None:
    """Text from the web holds separators that Python's `splitlines` takes for ends of lines."""
    (tmp_path / "rows.jsonl").write_text('{"question": "one\u2028two\x85three", "answer": "1"}\r\n', encoding="utf-8")
    found = load_questions(Questions(path=str(tmp_path / "rows.jsonl")), seed=0, heldout=False)
    assert [one.question for one in found.questions] == ["one\u2028two\x85three"]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (
            {"question": "a", "anwser": "#### 1"},
            "rows.jsonl:2: field 'answer' is missing; the row has 'question', 'anwser'",
        ),
        ({"question": " ", "answer": "#### 1"}, "rows.jsonl:2: field 'question' is ' '; it must be a text"),
        (
            {"question": "a \ud83d b", "answer": "1"},
            r"rows.jsonl:2: field 'question' is 'a \\ud83d b'; it must be a text",
        ),
        ({"question": "a", "answer": 18}, "rows.jsonl:2: field 'answer' is 18; it must be a text"),
        ({"question": "a", "answer": "eighteen"}, "rows.jsonl:2: answer ends in 'eighteen'; it must end in a number"),
        ({"question": "a", "answer": "#### 70 000"}, "rows.jsonl:2: answer ends in '70 000'; it must end in a number"),
        ({"question": "a", "answer": "1 2/3"}, "rows.jsonl:2: answer ends in '1 2/3'; it must end in a number"),
        (["a", "1"], "rows.jsonl:2: is no object"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, row: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load(tmp_path, [{"question": "ok", "answer": "1"}, row])


def test_made_questions_are_other_ones_than_the_held_out() -> None:
    asked = Questions(made={"levels": [{"digits": 2, "terms": 2}]}, num_questions=50)
    train, heldout = (load_questions(asked, seed=1, heldout=side) for side in (False, True))
    assert len(train.questions) + train.num_duplicates == 50
    assert not {q.question for q in train.questions} & {q.question for q in heldout.questions}
    first = train.questions[0]
    assert eval(first.question.strip().rstrip("=")) == int(first.gold)
    with pytest.raises(ConfigError, match=r"made: .*unexpected keyword argument 'digits'"):
        load_questions(Questions(made={"digits": 2}), seed=1, heldout=False)
