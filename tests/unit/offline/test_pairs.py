"""Which answers meet, what is left out and counted, and what is refused."""

import json
from pathlib import Path

import pytest
from trajectories import trajectory

from syncline.config.offline_collect import Pairs
from syncline.errors import ConfigError
from syncline.offline.pairs import PairSet, is_heldout, make_pairs, record, report, similarity
from syncline.offline.records import Trajectory, read_trajectories

WORDS = ["ant bee cat dog", "elk fox gnu hen owl", "ibis jay kite lark moth newt", "ox pig", "rat seal toad", "urchin"]


def attempts(correct: str, **fields: object) -> list[Trajectory]:
    """One a letter: `+` right, `-` wrong; texts share no word."""
    return [trajectory(sample=i, text=WORDS[i], correct=letter == "+", **fields) for i, letter in enumerate(correct)]


def pair(rollouts: list[Trajectory], **asked: object) -> PairSet:
    return make_pairs(rollouts, Pairs.model_validate({"heldout_fraction": 0, **asked}))


def met(found: PairSet) -> list[tuple[int, int]]:
    return [(one.chosen.sample, one.rejected.sample) for one in found.train]


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        ("nearest_length", [(1, 2), (0, 3)]),
        ("best_vs_worst", [(1, 4), (0, 2)]),
        ("hard_negative", [(1, 2), (0, 4)]),
        ("all", [(1, 4), (1, 2), (1, 3), (0, 4), (0, 2), (0, 3)]),
    ],
)
def test_strategies(strategy: str, expected: list[tuple[int, int]]) -> None:
    rollouts = attempts("++---")
    rewards, lengths, answers = [1.1, 1.4, 0.2, 0.3, 0.1], [10, 20, 21, 30, 90], ["7", "7", "3", "4", "3"]
    rollouts = [
        one.model_copy(update={"scores": {"reward": r}, "num_tokens": n, "answer": a})
        for one, r, n, a in zip(rollouts, rewards, lengths, answers, strict=True)
    ]
    asked = {"strategy": strategy, "max_per_question": 9, "max_coherence_per_question": 0}
    assert sorted(met(pair(rollouts, **asked))) == sorted(expected)
    assert met(pair(rollouts, **asked | {"max_per_question": 1}))[0] == (expected[0] if strategy != "all" else (1, 4))


def test_the_commonest_wrong_answer_is_what_most_attempts_gave() -> None:
    """Also where they said it in the same words, of which one is kept."""
    rollouts = [*attempts("+---"), *(trajectory(sample=i, text=WORDS[3], correct=False) for i in (4, 5))]
    answers = ["7", "9", "9", "8", "8", "8"]
    rollouts = [one.model_copy(update={"answer": a}) for one, a in zip(rollouts, answers, strict=True)]
    assert met(pair(rollouts, strategy="hard_negative", max_per_question=1)) == [(0, 3)]


def test_right_ones_differ_by_coherence_alone() -> None:
    rollouts = [one.model_copy(update={"scores": {"reward": 1 + i / 10}}) for i, one in enumerate(attempts("+++"))]
    found = pair(rollouts, min_reward_gap=0.15)
    assert met(found) == [(2, 0)] and found.train[0].kind == "coherence"
    with pytest.raises(ConfigError, match="all right, unpaired"):
        pair(rollouts, min_reward_gap=0.25)
    tied = [one.model_copy(update={"scores": {"reward": 1.6}}) for one in rollouts]
    with pytest.raises(ConfigError, match="not one to train on"):
        pair(tied)


def test_pairs_are_answers_to_one_prompt() -> None:
    rollouts = [*attempts("+"), *attempts("---", arm="rephrase", prompt="In other words: 7?")[1:]]
    with pytest.raises(ConfigError, match="mixed, unpaired"):
        pair(rollouts)
    across = pair(rollouts, across_prompts=True)
    assert report(across)["rejected_off_prompt"] == 1
    told = record(across.train[0], strategy="x")
    assert told["prompt"][0]["content"] == "7?" and told["provenance"]["rejected_on_prompt"] is False


def test_what_is_left_out_is_counted() -> None:
    rollouts = [
        *attempts("+-"),
        trajectory(sample=2, text=WORDS[0], correct=True),
        trajectory(sample=3, text="  ", correct=False),
        trajectory(sample=4, text="never ends", correct=False, finish_reason="length"),
        trajectory(sample=0, text="a twin", correct=False, arm="solve@cf"),
    ]
    found = pair(rollouts)
    assert met(found) == [(0, 1)]
    assert found.left_out == {"near-duplicates": 1, "empty texts": 1, "truncated": 1, "counterfactual twins": 1}
    assert found.questions == {"all": 1, "paired": 1}


def test_chosen_and_rejected_that_read_alike_are_no_pair() -> None:
    long = "one two three four five six seven eight nine ten eleven"
    rollouts = [trajectory(sample=0, text=f"{long} 7", correct=True), trajectory(sample=1, text=f"{long} 8")]
    assert similarity(rollouts[0].text, rollouts[1].text) == pytest.approx(10 / 12)
    with pytest.raises(ConfigError, match="1 pairs too alike"):
        pair(rollouts, max_similarity=0.8)
    assert met(pair(rollouts, max_similarity=0.9)) == [(0, 1)]


def test_caps_are_per_question() -> None:
    rollouts = [*attempts("+++---"), *attempts("+-", question="8?")]
    found = pair(rollouts, max_per_question=2)
    assert len(found.train) == 3 and found.left_out == {"correctness pairs over the cap": 1}


def test_split_is_by_question_and_by_nothing_else() -> None:
    rollouts = [one for n in range(60) for one in attempts("+-", question=f"what is {n}?")]
    found = pair(rollouts, heldout_fraction=0.25)
    train, heldout = ({one.chosen.question_id for one in side} for side in (found.train, found.heldout))
    assert len(train) + len(heldout) == 60 and not train & heldout and 5 <= len(heldout) <= 25
    assert heldout == {question_id for question_id in train | heldout if is_heldout(question_id, 0.25)}


def test_a_pair_tells_where_it_comes_from() -> None:
    [one] = pair(attempts("+-")).train
    told = json.loads(json.dumps(record(one, strategy="nearest_length")))
    assert told["prompt"] == [{"role": "user", "content": "7?"}]
    assert told["chosen"] == [{"role": "assistant", "content": WORDS[0]}]
    source = told["provenance"]["rejected"]
    assert source["key"].endswith("/solve/1") and source["scores"]["reward"] == 0.0
    assert len(source["token_ids"]) == len(source["logprobs"]) == source["num_tokens"]
    assert told["provenance"]["kind"] == "correctness" and told["provenance"]["model"] == "model-a"


def test_report_says_whether_length_gives_the_choice_away() -> None:
    rollouts = [one for n in range(4) for one in attempts("+-", question=f"{n}?")]
    lengths = report(pair(rollouts))["length"]["all"]
    assert lengths["chosen_longer"] == 0.0 and not lengths["balanced"] and lengths["median_difference"] == -4


def test_rollouts_of_another_model_and_twice_the_same_are_refused() -> None:
    with pytest.raises(ConfigError, match="is of model model-b, and not of model-a"):
        pair([*attempts("+"), *attempts("-", model="model-b", question="8?")])
    with pytest.raises(ConfigError, match="is of model model-a, and not of model-c"):
        make_pairs(attempts("+-"), Pairs(), model="model-c")
    with pytest.raises(ConfigError, match="/solve/0: is there twice"):
        pair([*attempts("+-"), *attempts("+")])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"answer": None, "anwser": "7"},
            r"rollouts\.jsonl:1: field 'answer' is missing; is it the one written 'anwser'",
        ),
        ({"logprobs": [-0.5]}, r"rollouts\.jsonl:1: .* 1 logprobs.* these must be as many"),
        ({"correct": "perhaps"}, r"rollouts\.jsonl:1: field 'correct'"),
        ({"surprise": 1}, r"rollouts\.jsonl:1: unknown field 'surprise'; known are key, question_id"),
    ],
)
def test_spoilt_rollouts_are_refused_by_line(tmp_path: Path, change: dict, said: str) -> None:
    row = {**attempts("+")[0].model_dump(mode="json"), **change}
    (tmp_path / "rollouts.jsonl").write_text(json.dumps({k: v for k, v in row.items() if v is not None}) + "\n")
    with pytest.raises(ConfigError, match=said):
        list(read_trajectories(tmp_path / "rollouts.jsonl", Trajectory))


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rollouts.jsonl").write_text("")
    with pytest.raises(ConfigError, match="has no trajectories"):
        list(read_trajectories(tmp_path / "rollouts.jsonl", Trajectory))
