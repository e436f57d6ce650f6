"""Marks of answers and of two models against each other, worked out by hand."""

from dataclasses import replace

import pytest

from syncline.config.offline import Eval
from syncline.config.offline_collect import Questions
from syncline.envs.estimators import mcnemar
from syncline.offline.marks import GREEDY, SAMPLED, Marked, compare, read_answer, summarise
from syncline.offline.questions import Question
from syncline.offline.records import Attempt

ASKED = Eval(sets=(Questions(name="sums", made={}),), format="Answer:")


def marked(question_id: str, text: str, *, arm: str = GREEDY, finish_reason: str = "stop") -> Marked:
    question = Question("3+4=", "3 + 4 = <<3+4=7>>7\n#### 7")
    attempt = Attempt.model_construct(arm=arm, text=text, num_tokens=len(text), finish_reason=finish_reason)
    return replace(read_answer(ASKED, question, attempt), question_id=question_id)


def test_rates_at_k_come_from_one_set_of_samples() -> None:
    """a: 1 of 4 right, but the vote of all four is wrong; b: 3 of 4."""
    answers = [marked("a", "Answer: 7"), marked("b", "it is 8", finish_reason="length")]
    answers += [marked("a", text, arm=SAMPLED) for text in ("Answer: 7", "Answer: 5", "5", "Answer: 6")]
    answers += [marked("b", text, arm=SAMPLED) for text in ("7", "7.0", "Answer: 7", "")]
    found = summarise(answers)
    assert found["greedy"]["accuracy"] == 0.5
    assert found["greedy"]["interval"] == pytest.approx((0.0945, 0.9055), abs=1e-4)
    assert (found["greedy"]["truncated_rate"], found["greedy"]["format_rate"]) == (0.5, 0.5)
    assert found["sampled"]["accuracy"] == 0.5 and found["sampled"]["no_answer_rate"] == 1 / 8
    assert {k: at["rate"] for k, at in found["pass_at"].items()} == {"1": 0.5, "2": 0.75, "4": 1.0}
    assert found["majority_at"]["4"]["rate"] == 0.5
    assert found["lm_eval"]["flexible-extract"] == {"accuracy": 0.5, "agreement": 1.0}
    assert found["lm_eval"]["strict-match"] == {"accuracy": 0.0, "agreement": 0.5}, "nothing stands behind ####"


def test_two_models_are_compared_on_the_questions_both_answered() -> None:
    before = [marked(q, text) for q, text in {"a": "5", "b": "7", "c": "6", "d": "7", "gone": "7"}.items()]
    after = [marked(q, text) for q, text in {"a": "7", "b": "7", "c": "7", "d": "8", "new": "7"}.items()]
    found = compare(before, after)
    assert (found["num_questions"], found["num_left_out"], found["same_text"]) == (4, 2, 1)
    assert (found["fixed"], found["broken"], found["accuracy_before"], found["accuracy_after"]) == (2, 1, 0.5, 0.75)
    assert found["p"] == 1.0 and found["sampled"] is None


def test_samples_are_compared_question_by_question() -> None:
    """Of six questions five have more right samples than before; the sixth as many."""
    before = [marked(q, text, arm=SAMPLED) for q in "abcdef" for text in ("5", "7")]
    after = [marked(q, text, arm=SAMPLED) for q in "abcde" for text in ("7", "7")]
    after += [marked("f", text, arm=SAMPLED) for text in ("7", "8")]
    greedy = [marked("a", "7")]
    found = compare(greedy + before, greedy + after)["sampled"]
    assert found == {"before": 0.5, "after": pytest.approx(11 / 12), "better": 5, "worse": 0, "p": 2 / 32}


def test_mcnemar_is_the_exact_binomial_test() -> None:
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(9, 7) == pytest.approx(0.8036, abs=1e-4)
    assert mcnemar(0, 5) == mcnemar(5, 0) == 2 / 32
