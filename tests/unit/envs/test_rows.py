"""Rows of files: what separates them, and what is none."""

import json
from pathlib import Path

import pytest

from syncline.envs.rows import PromptRow, Rows, file_rows, prompt_row
from syncline.errors import ConfigError


@pytest.mark.parametrize("end", ["\n", "\r\n", ""])
def test_only_a_newline_ends_a_row(tmp_path: Path, end: str) -> None:
    """A text may hold what Unicode calls a line's end, as it is: JSON need not escape it."""
    texts = ["a\u2028b", "c\x85d\x0b", "e"]
    lines = [json.dumps(text, ensure_ascii=False) for text in texts]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(("\ufeff" + (end or "\n").join(lines) + end).encode())
    assert list(file_rows(str(path))) == [(f"{path}:{n}", text) for n, text in enumerate(texts, start=1)]


def test_a_data_set_without_rows_is_refused_when_it_is_read() -> None:
    with pytest.raises(ConfigError, match="path: has no training rows"):
        Rows[PromptRow]((), lambda: (), build=prompt_row, key=repr, seed=0)


@pytest.mark.parametrize("prompt", ["half a \ud83d", [{"role": "user", "content": None}], [{"role": "user"}], "", 3])
def test_a_prompt_that_is_no_text_is_refused_with_its_row(prompt: object) -> None:
    with pytest.raises(ConfigError, match=r"x\.jsonl:7: field 'prompt' must be a text or a list"):
        prompt_row({"prompt": prompt}, "x.jsonl:7")
