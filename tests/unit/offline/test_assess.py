"""Evaluations whose answers are there: no engine is asked, and answers of other weights or questions are refused."""

import json
import re
import resource
from pathlib import Path

import pytest
from real_engine import save_tokenizer

from syncline.cli.assess import comparisons
from syncline.config.offline import Eval, OfflineConfig, OfflineRun, load_offline
from syncline.config.offline_collect import Questions
from syncline.errors import ConfigError, EngineError
from syncline.offline.assess import EVALUATION_FILE, answers_file, assess, read_marks
from syncline.offline.collect import Place
from syncline.offline.questions import Question
from syncline.offline.replica import OTHER_FILES
from syncline.offline.report import write_offline_report

MODEL = "a" * 64
SUMS = {"3+4=": "7", "5+5=": "10"}


def attempt(question: str, text: str, **changes: object) -> dict:
    own = Question(question, SUMS[question])
    return {
        "key": f"{own.question_id}/greedy/0",
        "question_id": own.question_id,
        "question": question,
        "gold": own.gold,
        "arm": "greedy",
        "sample": 0,
        "seed": 1,
        "prompt": [{"role": "user", "content": question}],
        "text": text,
        "token_ids": [3] * len(text),
        "logprobs": [-0.5] * len(text),
        "num_tokens": len(text),
        "num_prompt_tokens": len(question),
        "finish_reason": "stop",
        "model": MODEL,
    } | changes


@pytest.fixture
def asked(tmp_path: Path) -> Eval:
    rows = [json.dumps({"question": q, "answer": a}) + "\n" for q, a in SUMS.items()]
    (tmp_path / "rows.jsonl").write_text("".join(rows))
    sums = Questions(name="sums", path=str(tmp_path / "rows.jsonl"))
    return Eval(sets=(sums,), prompt="{question}", format=r"^\d+$", max_tokens=4)


def place(folder: Path, asked: Eval, attempts: list[dict]) -> Place:
    save_tokenizer(folder)
    (folder / answers_file(asked.sets[0])).write_text("".join(json.dumps(one) + "\n" for one in attempts))
    nobody = ("http://127.0.0.1:9",)
    return Place(folder, nobody, str(folder), max_length=16, timeout_seconds=1.0, slots=4)


def test_marks_are_in_the_questions_order_whatever_the_answers_was(asked: Eval, tmp_path: Path) -> None:
    """Two evaluations are laid side by side: each one's answers came in an order of its own."""
    told = [attempt("5+5=", "10"), attempt("3+4=", "8")]
    assess(asked, place(tmp_path, asked, told), model=MODEL, seed=0)
    marks = read_marks(asked, tmp_path, asked.sets[0], seed=0)
    assert [(mark.question, mark.is_correct) for mark in marks] == [("3+4=", False), ("5+5=", True)]


def test_answers_that_are_there_are_marked_and_bound_to_their_model(asked: Eval, tmp_path: Path) -> None:
    where = place(tmp_path, asked, [attempt("3+4=", "7"), attempt("5+5=", "it is 11")])
    found = assess(asked, where, model=MODEL, seed=0)
    assert found == json.loads((tmp_path / EVALUATION_FILE).read_text()) | {"sets": found["sets"]}
    assert (found["model"], found["tokens"]) == (MODEL, 9)
    greedy = found["sets"]["sums"]["greedy"]
    assert (greedy["accuracy"], greedy["format_rate"], greedy["mean_tokens"]) == (0.5, 0.5, 4.5)
    assert [one.is_correct for one in read_marks(asked, tmp_path, asked.sets[0], seed=0)] == [True, False]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"model": "b" * 64}, r"answers-sums\.jsonl: was answered by b{12}, and a{12} is evaluated"),
        ({"key": "elsewhere/greedy/0"}, r"elsewhere/greedy/0 is no question of this set"),
    ],
)
def test_answers_of_something_else_are_refused(asked: Eval, tmp_path: Path, changes: dict, told: str) -> None:
    where = place(tmp_path, asked, [attempt("3+4=", "7"), attempt("5+5=", "10", **changes)])
    with pytest.raises(ConfigError, match=told):
        assess(asked, where, model=MODEL, seed=0)
    assert not (tmp_path / EVALUATION_FILE).exists()


def test_a_baseline_of_other_questions_is_compared_on_those_in_both_or_refused(asked: Eval, tmp_path: Path) -> None:
    config = OfflineConfig.model_construct(eval=asked, run=OfflineRun(dir="any"))
    both = [attempt("3+4=", "7"), attempt("5+5=", "11")]
    for folder in (before := tmp_path / "before", after := tmp_path / "after"):
        folder.mkdir()
        assess(asked, place(folder, asked, both), model=MODEL, seed=0)
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"question": "3+4=", "answer": "7"}) + "\n")
    assess(asked, place(after, asked, both[:1]), model=MODEL, seed=0)
    found = comparisons(config, before, after)["sums"]
    assert (found["num_questions"], found["num_left_out"], found["accuracy_before"]) == (1, 1, 1.0)
    rows.write_text(json.dumps({"question": "5+5=", "answer": "10"}) + "\n")
    with pytest.raises(ConfigError, match=r"before and .*after have no question of the set 'sums' in common"):
        (before / answers_file(asked.sets[0])).write_text(json.dumps(both[1]) + "\n")
        comparisons(config, before, after)


def test_before_in_the_report_is_what_the_comparison_begins_with(asked: Eval, tmp_path: Path) -> None:
    """`eval.baseline`, where there is one: fixed, broken and p are against that."""
    texts = {"baseline": ("7", "10"), "evaluate-0": ("7", "11"), "evaluate-1": ("8", "11")}
    facts = {}
    for name, (first, second) in texts.items():
        (folder := tmp_path / name).mkdir()
        answers = [attempt("3+4=", first), attempt("5+5=", second)]
        facts[name] = assess(asked, place(folder, asked, answers), model=MODEL, seed=0)
        manifest = {"facts": facts[name], "seconds": 1.0, "tokens": 9, "attempts": [{"versions": {}}]}
        (folder / "manifest.json").write_text(json.dumps(manifest))
    values = {
        "run": {"dir": str(tmp_path)},
        "model": {"path": "any", "lora": {}},
        "collect": {"questions": {"made": {}}},
        "eval": asked.model_dump(mode="json"),
    }
    (tmp_path / "pipeline.yaml").write_text(json.dumps(values))
    config = load_offline(tmp_path / "pipeline.yaml")
    own = [{"round": i, "folder": f"evaluate-{i}", **facts[f"evaluate-{i}"]} for i in (0, 1)]
    compared = comparisons(config, tmp_path / "baseline", tmp_path / "evaluate-1")
    (tmp_path / "summary.json").write_text(json.dumps({"rounds": [], "evaluations": own, "comparisons": compared}))
    page = write_offline_report(tmp_path, num_examples=1).read_text()
    cells = re.findall("<td>(.*?)</td>", page[page.index("McNemar") :])[:6]
    assert cells == ["sums", "2", "1.0000 [0.3424, 1.0000]", "0.0000 [0.0000, 0.6576]", "0", "2"]


def test_as_many_files_may_be_open_as_there_are_requests_in_flight(
    asked: Eval, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond the limit, requests without a connection reach their deadline, and the engine is blamed for it."""
    limits = [(100, 4096)]
    monkeypatch.setattr(resource, "getrlimit", lambda which: limits[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda which, wanted: limits.append(wanted))
    hasty = asked.model_copy(update={"lost_after_seconds": 0.01})
    with pytest.raises(EngineError, match="no engine is left, 2 items are not done"):
        assess(hasty, place(tmp_path, asked, []), model=MODEL, seed=0)
    assert limits[-1] == (2 + OTHER_FILES, 4096)


def test_a_folder_without_an_evaluation_is_no_baseline(asked: Eval, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no evaluation\.json"):
        read_marks(asked, tmp_path, asked.sets[0], seed=0)


def test_a_question_that_leaves_no_room_for_an_answer_is_named(asked: Eval, tmp_path: Path) -> None:
    where = place(tmp_path, asked.model_copy(update={"prompt": "{question}" * 4}), [])
    with pytest.raises(ConfigError, match=r"model\.max_length: 16, but question .* has 16 prompt tokens"):
        assess(asked.model_copy(update={"prompt": "{question}" * 4}), where, model=MODEL, seed=0)
