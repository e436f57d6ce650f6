"""Real rows, answers in every dress, and the faults a file can have, each named by file and line."""

import asyncio
import json
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from character_tokenizer import CharacterTokenizer, completion

from syncline.envs.rendering import ChatPolicy
from syncline.envs.tasks.gsm8k import Gsm8k, WordProblem
from syncline.errors import ConfigError
from syncline.testing import FakeGenerate
from syncline.types import SamplingParams

ROWS = Path(__file__).parents[3] / "golden" / "gsm8k_rows.jsonl"
GOOD = '{"question": "How many?", "answer": "One and one. #### 2"}'


@pytest.fixture
def gsm8k() -> Gsm8k:
    return Gsm8k(path=str(ROWS))


def write(path: Path, *lines: str) -> str:
    path.write_text("\n".join(lines))
    return str(path)


def test_rows_are_read_with_their_integers(gsm8k: Gsm8k):
    assert [row.answer for row in gsm8k.rows.train] == ["72", "10", "5", "42", "1080"]
    assert gsm8k.rows.train[0].question.startswith("Natalia sold clips to 48 of her friends")


def test_every_epoch_has_every_row_in_an_order_of_its_own(gsm8k: Gsm8k):
    epochs = [[gsm8k.task(index).answer for index in range(start, start + 5)] for start in range(0, 100, 5)]
    assert all(sorted(epoch) == sorted(epochs[0]) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 5
    assert epochs[0] == [Gsm8k(path=str(ROWS)).task(index).answer for index in range(5)]


@pytest.mark.parametrize(
    ("text", "correct", "has_format"),
    [
        ("So it is \\boxed{1080}.", 1.0, 1.0),
        ("\\boxed{1,080}", 1.0, 1.0),
        ("\\boxed{\\$1080}", 1.0, 1.0),
        ("\\boxed{1080.00}", 1.0, 1.0),
        ("\\boxed{\\frac{2160}{2}}", 1.0, 1.0),
        ("\\boxed{1080\\text{ dollars}}", 1.0, 1.0),
        ("first \\boxed{7}, no: \\boxed{1080}", 1.0, 1.0),
        ("first \\boxed{1080}, no: \\boxed{7}", 0.0, 1.0),
        ("\\boxed{1081}", 0.0, 1.0),
        ("\\boxed{-1080}", 0.0, 1.0),
        ("\\boxed{one}", 0.0, 1.0),
        ("\\boxed{}", 0.0, 0.0),
        ("\\boxed{1080", 0.0, 0.0),
        ("1080", 0.0, 0.0),
        ("", 0.0, 0.0),
    ],
)
def test_boxed_answers(gsm8k: Gsm8k, text: str, correct: float, has_format: float):
    parts = gsm8k.score(WordProblem("?", "1080"), text).parts
    assert (parts["correct"], parts["format"]) == (correct, has_format)


@pytest.mark.parametrize("answer", ["9^{9^{9^{9}}}", "99999!", "9**9**9**9", "\\sum_{n=1}^{10} n", "9" * 70])
def test_answers_too_costly_to_compare_are_wrong_at_once(gsm8k: Gsm8k, answer: str):
    assert gsm8k.score(WordProblem("?", "18"), f"\\boxed{{{answer}}}").parts["correct"] == 0.0


def test_hashes_format_asks_for_and_reads_the_last_marked_line():
    gsm8k = Gsm8k(path=str(ROWS), answer_format="hashes")
    assert "`#### answer`" in gsm8k.prompt(gsm8k.task(0))[0].content
    problem = WordProblem("?", "18")
    assert gsm8k.score(problem, "#### 3\nso\n#### $18.\n").parts["correct"] == 1.0
    assert gsm8k.score(problem, "\\boxed{18}").parts == {"correct": 0.0, "format": 0.0, "length": 1.0}


@pytest.mark.parametrize(("num_chars", "part"), [(10, 1.0), (15, 0.5), (20, 0.0), (50, 0.0)])
def test_length_part_falls_from_max_chars_to_twice_that(num_chars: int, part: float):
    gsm8k = Gsm8k(path=str(ROWS), max_chars=10, weights={"correct": 1.0, "length": 0.4})
    score = gsm8k.score(WordProblem("?", "1"), "x" * num_chars)
    assert score.parts["length"] == part
    assert score.reward == pytest.approx(0.4 * part)


@pytest.mark.parametrize(
    ("answer", "correct"),
    [("1,080", 1.0), ("\\$1080.00", 1.0), ("1080.5", 0.0), ("\\frac{2160}{2}", 0.0), ("1080 dollars", 0.0), ("x", 0.0)],
)
def test_exact_checker_knows_decimal_numbers_and_needs_no_package(
    monkeypatch: pytest.MonkeyPatch, answer: str, correct: float
):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    gsm8k = Gsm8k(path=str(ROWS), checker="exact")
    assert gsm8k.score(WordProblem("?", "1080"), f"\\boxed{{{answer}}}").parts["correct"] == correct


def test_equal_numbers_are_one_answer_and_none_is_none(gsm8k: Gsm8k):
    problem = WordProblem("?", "1")
    votes = [gsm8k.answer(problem, f"\\boxed{{{text}}}") for text in ("1,080", "\\$1080.00", "1080.", "1081", "x", "")]
    assert len(set(votes[:3])) == 1 and len(set(votes)) == 4 and votes[-1] is None
    assert gsm8k.answer(problem, "1080") is None


def test_answers_after_calling_a_calculator():
    gsm8k = Gsm8k(path=str(ROWS), tools=["calculator"], checker="exact")
    said = ['<tool_call>{"name": "calculator", "arguments": {"expression": "36/2"}}</tool_call>', "\\boxed{18}"]
    generate = FakeGenerate(lambda prompt, sampling, i: completion(said.pop(0)))
    policy = ChatPolicy(CharacterTokenizer(), generate, SamplingParams(max_tokens=200), max_length=9000)
    [rollout] = asyncio.run(gsm8k.rollouts(WordProblem("?", "18"), 1, policy))
    assert (rollout.reward, rollout.messages[2].content) == (1.0, "<tool_response>\n18.0\n</tool_response>")


def test_scores_outside_the_main_thread(gsm8k: Gsm8k):
    """math-verify's own time limits are signals, which raise there."""
    scores: list[float] = []
    thread = threading.Thread(
        target=lambda: scores.append(gsm8k.score(WordProblem("?", "18"), "\\boxed{\\frac{36}{2}}").reward)
    )
    thread.start()
    thread.join(timeout=60)
    assert scores == [1.0]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("{not json", "is not JSON"),
        ('{"answer": "#### 2"}', "'question' is missing"),
        ('{"question": "How many?"}', "'answer' is missing"),
        ('{"question": "How many?", "answer": " "}', "'answer' is missing or empty"),
        ('{"question": "How many?", "answer": "2"}', "does not end in"),
        ('{"question": "How many?", "answer": "#### two"}', "does not end in"),
        ("[1, 2]", "'question' is missing"),
        ("", "is not JSON"),
    ],
)
def test_bad_row_is_named_by_file_and_line(tmp_path: Path, row: str, words: str):
    path = write(tmp_path / "rows.jsonl", GOOD, row, GOOD)
    with pytest.raises(ConfigError, match=rf"rows\.jsonl:2: .*{words}"):
        Gsm8k(path=path)


def test_file_without_rows_and_missing_file_are_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="has no rows"):
        Gsm8k(path=write(tmp_path / "empty.jsonl"))
    with pytest.raises(ConfigError, match=r"nothing\.jsonl.*cannot be read"):
        Gsm8k(path=str(tmp_path / "nothing.jsonl"))


def test_heldout_is_the_test_file_once_through_and_disjoint(tmp_path: Path):
    train = write(tmp_path / "train.jsonl", GOOD)
    other = json.dumps({"question": "And now?", "answer": "#### -3"})
    gsm8k = Gsm8k(path=train, heldout_path=write(tmp_path / "test.jsonl", other))
    assert gsm8k.task(0, split="heldout") == WordProblem("And now?", "-3")
    with pytest.raises(ConfigError, match=r"evaluation\.num_tasks: there are 1 held-out"):
        gsm8k.task(1, split="heldout")
    leaking = Gsm8k(path=train, heldout_path=write(tmp_path / "leak.jsonl", other, GOOD))
    with pytest.raises(ConfigError, match=r"1 questions are training rows too, such as 'How many\?'"):
        leaking.task(0, split="heldout")


def test_heldout_without_a_file_says_what_to_give(gsm8k: Gsm8k):
    with pytest.raises(ConfigError, match="heldout_path: is needed"):
        gsm8k.task(0, split="heldout")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({"answer_format": "bold"}, "answer_format: 'bold' is not one of boxed, hashes"),
        ({"max_chars": 0}, "max_chars: 0"),
        ({"checker": "eyes"}, "checker: 'eyes' is not one of math-verify, exact"),
        ({"weights": {"style": 1.0}}, "weights.*correct, format, length"),
        ({"path": None, "heldout_path": "x"}, "heldout_path: 'x' is given without path"),
    ],
)
def test_unusable_arguments_are_refused_by_name(args: dict[str, Any], words: str):
    with pytest.raises(ConfigError, match=words):
        Gsm8k(**{"path": str(ROWS), **args})


@pytest.mark.parametrize(("module", "words"), [("datasets", "path: is not given"), ("math_verify", "gsm8k compares")])
def test_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch, module: str, words: str):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=rf"{words}.*syncline\[gsm8k\]"):
        Gsm8k()


def test_hub_out_of_reach_is_an_error_with_remedy(monkeypatch: pytest.MonkeyPatch):
    import datasets

    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(ConfigError, match=r"cannot be loaded from the hub \(offline\).*heldout_path"):
        Gsm8k()
