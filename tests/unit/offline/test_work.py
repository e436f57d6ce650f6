"""What is due, from configuration, questions and answers alone: so a killed collection stands where it stood."""

import pytest

from syncline.config.offline_collect import Collect, Questions
from syncline.offline.questions import Question
from syncline.offline.work import Workload

HENS = Question("A farm has 48 hens and sells half of them. How many are left?", "<<48/2=24>>\n#### 24")
COWS = Question("A farm has many cows. How many?", "#### 1,875")


def workload(**asked: object) -> Workload:
    collect = Collect.model_validate({"questions": Questions(path="x"), **asked})
    return Workload([HENS, COWS], collect, seed=3)


@pytest.mark.parametrize(("coherence", "num_arms", "num_items"), [("v8", 8, 16), ("v11", 11, 22), ("v2", 2, 16)])
def test_first_round(coherence: str, num_arms: int, num_items: int) -> None:
    own = workload(coherence=coherence)
    items = own.first()
    assert len(own.arms) == num_arms and len({item.key for item in items}) == num_items == len(items)
    assert len({item.seed for item in items}) == num_items, "no two items share a seed"
    assert [item.seed for item in items] == [item.seed for item in workload(coherence=coherence).first()]
    assert all(item.question in item.prompt[0].content for item in items)


def test_arms_of_one_instruction_are_one_prompt() -> None:
    prompts = {
        item.arm.name: item.prompt for item in workload(coherence="v11").first() if item.question == COWS.question
    }
    assert len(set(prompts.values())) == 5 and prompts["wolfram_0"] == prompts["wolfram_3"]


def test_twins_ask_the_changed_question_with_their_originals_seed() -> None:
    items = {item.key: item for item in workload(num_twins=1).first()}
    twins = [item for item in items.values() if item.is_twin]
    assert {twin.arm.name for twin in twins} == {"solve@cf", "rephrase@cf"}, "of the question that has a counterfactual"
    for twin in twins:
        assert "has 50 hens" in twin.prompt[0].content and twin.gold == "25"
        assert twin.seed == items[twin.key.replace("@cf", "")].seed


def answer_all(own: Workload, answers: dict[str, list[str]]) -> list[str]:
    """Keys in the order they became due, each question answered by its list in turn."""
    due, order = own.first(), []
    while due:
        item = due.pop(0)
        order.append(item.key)
        due += own.finished(item, f"Answer: {answers[item.question].pop(0)}")
    return order


def test_mixed_questions_are_asked_again_and_settled_ones_are_not() -> None:
    own = workload(num_samples=1, max_rounds=3)
    answers = {HENS.question: ["24", "24"], COWS.question: ["1,875", "3", "1875", "4", "5", "6"]}
    order = answer_all(own, answers)
    assert [key.partition("/")[2] for key in order if key.startswith(COWS.question_id)] == [
        "solve/0", "rephrase/0", "solve/1", "rephrase/1", "solve/2", "rephrase/2",
    ]  # fmt: skip
    counts = {"questions": 2, "settled_early": 1, "asked_again": 1, "spared_samples": 4}
    assert own.counts() == counts


def test_one_wrong_answer_by_all_settles_a_question_and_several_do_not() -> None:
    own = workload(num_samples=1, max_rounds=2)
    order = answer_all(own, {HENS.question: ["7", "7"], COWS.question: ["1", "2", "3", "4"]})
    assert len([key for key in order if key.startswith(HENS.question_id)]) == 2
    assert len(order) == 6


def test_gold_goes_through_the_versions_own_reading() -> None:
    item = next(item for item in workload(coherence="v8").first() if item.question == COWS.question)
    assert workload(coherence="v8").is_correct(item, "#### 1,999"), "1,875 is 1 to v8, and so is 1,999"
    assert not workload(coherence="v2").is_correct(item, "#### 1,999")
    assert workload(coherence="v2").is_correct(item, "Answer: 1875.0")
