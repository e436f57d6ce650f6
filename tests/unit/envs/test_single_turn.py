"""What becomes of every way an attempt can end."""

import asyncio
from collections.abc import Callable

import pytest
from character_tokenizer import CharacterTokenizer, completion

from syncline.envs.rendering import ChatPolicy
from syncline.envs.scoring import Score, check_weights, weighted_score
from syncline.envs.single_turn import SingleTurn
from syncline.errors import ConfigError, EngineError, EngineTimeout
from syncline.testing import FakeGenerate
from syncline.trajectory.wire import encode_group
from syncline.types import Completion, FinishReason, Message, Rollout, RolloutGroup, RolloutStatus, SamplingParams


class Echo(SingleTurn):
    """Says what it is asked; `score` is what the test puts there."""

    name = "echo"

    def __init__(self, score: Callable[[str], Score] = lambda text: Score(float(len(text)))) -> None:
        self._score = score

    def task(self, index: int, *, split: str = "train") -> str:
        return f"task {index}"

    def prompt(self, task: str) -> list[Message]:
        return [Message("user", task)]

    def score(self, task: str, text: str) -> Score:
        return self._score(text)


class HalfACharacter(Echo):
    def prompt(self, task: str) -> list[Message]:
        return [Message("user", "a \ud83d")]


def attempt(environment: SingleTurn, *answers: Completion, max_length: int = 100) -> tuple[list[Rollout], FakeGenerate]:
    generate = FakeGenerate(lambda prompt, sampling, i: answers[i])
    policy = ChatPolicy(CharacterTokenizer(), generate, SamplingParams(max_tokens=8), max_length=max_length)
    return asyncio.run(environment.rollouts("ask", len(answers), policy)), generate


def test_group_is_sampled_in_one_call_and_scored_by_text():
    rollouts, generate = attempt(Echo(), completion("a"), completion("abc", policy_version=3))
    assert [(prompt, n) for prompt, _, n in generate.calls] == [((97, 115, 107), 2)]
    assert [r.reward for r in rollouts] == [1.0, 3.0]
    assert {r.status for r in rollouts} == {RolloutStatus.COMPLETED}
    assert rollouts[1].messages == (Message("user", "ask"), Message("assistant", "abc"))
    (sample,) = rollouts[1].samples
    assert sample.token_ids == (97, 115, 107, 97, 98, 99)
    assert sample.loss_mask == (False,) * 3 + (True,) * 3
    assert [(s.policy_version, s.start, s.end) for s in sample.versions] == [(3, 3, 6)]


def test_length_limit_is_truncated_and_still_scored():
    (rollout,), _ = attempt(Echo(), completion("abcd", finish_reason=FinishReason.LENGTH))
    assert (rollout.status, rollout.reward) == (RolloutStatus.TRUNCATED, 4.0)


def test_abort_has_no_reward_and_keeps_what_was_sampled():
    (rollout, other), _ = attempt(Echo(), completion("ab", finish_reason=FinishReason.ABORT), completion("abc"))
    assert (rollout.status, rollout.reward) == (RolloutStatus.ABORTED, None)
    assert rollout.samples[0].num_sampled == 2
    assert other.reward == 3.0


def test_exception_from_score_is_an_error_status_of_that_attempt_alone():
    def score(text: str) -> Score:
        if text == "bad":
            raise KeyError("no such unit")
        return Score(1.0)

    (bad, good), _ = attempt(Echo(score), completion("bad"), completion("good"))
    assert (bad.status, bad.reward) == (RolloutStatus.ERROR, None)
    assert bad.error == "score raised KeyError: 'no such unit'"
    assert good.reward == 1.0


@pytest.mark.parametrize(
    ("score", "words"),
    [
        (lambda text: Score(float("nan")), "reward must be finite"),
        (lambda text: Score(1.0, {"style": float("inf")}), "style must be finite"),
        (lambda text: 1.0, "must return a Score, got 1.0"),
    ],
)
def test_unusable_score_is_an_error_status(score: Callable[[str], Score], words: str):
    (rollout,), _ = attempt(Echo(score), completion("x"))
    assert rollout.status is RolloutStatus.ERROR
    assert words in (rollout.error or "")


def test_prompt_without_room_is_an_error_of_every_attempt_and_samples_nothing():
    rollouts, generate = attempt(Echo(), completion("a"), completion("b"), max_length=3)
    assert [r.status for r in rollouts] == [RolloutStatus.ERROR] * 2
    assert "3 tokens and model.max_length = 3" in (rollouts[0].error or "")
    assert generate.calls == []


def test_exception_from_prompt_is_an_error_of_every_attempt():
    class Broken(Echo):
        def prompt(self, task: str) -> list[Message]:
            raise ZeroDivisionError("oh")

    (rollout,), generate = attempt(Broken(), completion("a"))
    assert rollout.error == "prompt raised ZeroDivisionError: oh"
    assert generate.calls == []


def test_engine_error_is_not_the_environments_to_hide():
    def refuse(*_: object) -> Completion:
        raise EngineTimeout("engine did not answer")

    policy = ChatPolicy(CharacterTokenizer(), FakeGenerate(refuse), SamplingParams(max_tokens=8), max_length=100)
    with pytest.raises(EngineTimeout, match="did not answer"):
        asyncio.run(Echo().rollouts("ask", 1, policy))


def test_tokens_without_a_policy_version_are_refused():
    unpublished = Completion((97,), (-0.5,), (), FinishReason.STOP)
    with pytest.raises(EngineError, match="nothing has been published"):
        attempt(Echo(), unpublished)


def test_weighted_score_reports_parts_without_weight():
    parts = {"correct": 1.0, "format": 1.0, "length": 0.5}
    assert weighted_score(parts, {"correct": 1.0, "length": 0.2}) == Score(1.1, parts)


@pytest.mark.parametrize("weights", [{}, {"corect": 1.0}, {"correct": float("nan")}, {"correct": "much"}])
def test_unusable_weights_are_refused_by_name(weights: dict):
    with pytest.raises(ConfigError, match="weights"):
        check_weights(weights, parts=("correct", "format"))


def test_a_prompt_or_a_fault_with_half_a_character_can_still_be_sent():
    """Data of the web has them; such a task must not end its worker when the group is put."""

    def score(text: str) -> Score:
        raise ValueError("\ud83d")

    for environment, told in ((HalfACharacter(), "prompt raised ValueError"), (Echo(score), r"ValueError: \ud83d")):
        [rollout], _ = attempt(environment, completion("7"))
        assert rollout.status is RolloutStatus.ERROR and told in (rollout.error or "")
        encode_group(RolloutGroup("g", "e", 0, (rollout,)))


@pytest.mark.parametrize("prompt", ["2+2=", Message("user", "2+2="), [{"role": "user", "content": "2+2="}]])
def test_a_prompt_that_is_no_list_of_messages_is_an_error_that_can_be_sent(prompt: object):
    environment = Echo()
    environment.prompt = lambda task: prompt  # type: ignore[method-assign, return-value]
    [rollout], generate = attempt(environment, completion("7"))
    assert (rollout.status, rollout.messages, generate.calls) == (RolloutStatus.ERROR, (), [])
    assert (rollout.error or "").startswith("prompt raised TypeError: prompt() must return a list of messages, got ")
