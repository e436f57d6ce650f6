"""Numbers worked by hand over scripted rollouts, and one evaluation through a policy."""

import asyncio
import json
from collections.abc import Sequence
from dataclasses import asdict, replace

import pytest
from character_tokenizer import CharacterTokenizer, completion

from syncline.envs.estimators import wilson
from syncline.envs.evaluate import AtK, LevelResult, evaluate, summarize
from syncline.envs.rendering import ChatPolicy
from syncline.envs.tasks.arithmetic import Arithmetic, ArithmeticTask, split_of
from syncline.errors import EngineTimeout, SynclineError
from syncline.testing import FakeGenerate, make_group
from syncline.types import Completion, FinishReason, Message, Rollout, RolloutStatus, SamplingParams, TrainingSample


def rollout(reward: float, text: str, *, length: bool = False, **parts: float) -> Rollout:
    sample = TrainingSample.from_completion((61,), completion(text))
    status = RolloutStatus.TRUNCATED if length else RolloutStatus.COMPLETED
    return Rollout((sample,), reward, status, parts, (Message("assistant", text),))


def task(level: str) -> ArithmeticTask:
    return ArithmeticTask((1, 2), ("+",), level)


FAILED = Rollout((), None, RolloutStatus.ERROR, error="score raised KeyError: 'x'")


def test_numbers_of_five_tasks_of_which_one_failed():
    rollouts = [
        rollout(1.1, "12", correct=1.0, format=1.0),
        rollout(0.1, "1234", correct=0.0, format=1.0, length=True),
        FAILED,
        rollout(0.0, "", correct=0.0, format=0.0),
        rollout(1.1, "12", correct=1.0, format=1.0),
    ]
    tasks = [task("easy"), task("hard"), task("hard"), task("hard"), task("easy")]
    result = summarize(tasks, [[r] for r in rollouts], name="sums", split="heldout")
    assert (result.num_tasks, result.num_scored, result.first_error) == (5, 4, "score raised KeyError: 'x'")
    assert result.reward == pytest.approx(2.3 / 4)
    assert result.accuracy == 0.5
    assert result.interval == pytest.approx((0.1500, 0.8500), abs=1e-4)
    assert (result.mean_length, result.truncated_rate, result.format_rate) == (2.0, 0.25, 0.75)
    assert result.levels == {"easy": LevelResult(2, 1.0), "hard": LevelResult(2, 0.0)}
    assert json.loads(json.dumps(asdict(result)))["levels"]["easy"]["accuracy"] == 1.0


def test_graded_reward_without_parts_has_a_mean_and_no_interval():
    result = summarize(["a", "b"], [[rollout(0.25, "x")], [rollout(0.75, "y")]], name="graded", split="heldout")
    assert (result.accuracy, result.interval, result.format_rate, result.levels) == (0.5, None, None, {})


def test_nothing_scored_is_an_error_not_a_zero():
    with pytest.raises(SynclineError, match=r"none of 2 heldout attempts at 'sums'.*KeyError"):
        summarize([task("a")] * 2, [[FAILED], [FAILED]], name="sums", split="heldout")


def test_one_set_of_samples_gives_pass_and_majority_at_every_k():
    """Task one: 2 of 4 right, the wrong ones differ. Task two: never right. Task three lost half of its attempts."""
    said = [["7", "7", "8", "9"], ["1", "2", "2", "3"], ["7", "7"]]
    attempts = [[rollout(0.0, t, correct=float(t == "7")) for t in own] for own in said]
    attempts[2] += [FAILED, FAILED]
    result = summarize(["x", "y", "z"], attempts, name="sums", split="heldout", answer=lambda task, text: text or None)
    assert (result.num_samples, result.num_scored, result.accuracy) == (4, 10, pytest.approx((0.5 + 0 + 1) / 3))
    assert {k: (at.rate, at.num_tasks) for k, at in result.pass_at.items()} == {
        "1": (pytest.approx((0.5 + 0 + 1) / 3), 3),
        "2": (pytest.approx((5 / 6 + 0 + 1) / 3), 3),
        "4": (pytest.approx(0.5), 2),
    }
    assert result.majority_at["4"] == AtK(0.5, wilson(1, 2), 2)
    assert result.majority_at["1"].rate == pytest.approx(result.accuracy)
    assert json.loads(json.dumps(asdict(result)))["pass_at"]["2"]["num_tasks"] == 3


def test_what_a_tool_said_last_is_nobodys_vote():
    """The turns were used up: neither its text nor no message at all is an answer of the model's."""
    cut = replace(rollout(0.0, "7", length=True), messages=(Message("assistant", "?"), Message("user", "7")))
    attempts = [[rollout(1.0, "8"), cut, replace(cut, messages=())]]
    result = summarize(["x"], attempts, name="sums", split="heldout", answer=lambda task, text: text)
    assert (result.majority_at["1"].rate, result.majority_at["2"].rate) == (pytest.approx(1 / 3), pytest.approx(2 / 3))


def test_evaluates_heldout_tasks_one_attempt_each():
    def respond(prompt: Sequence[int], sampling: SamplingParams, i: int) -> Completion:
        left, right = map(int, "".join(map(chr, prompt)).rstrip("=").split("+"))
        asked.append((left, right))
        right_answer = left < 50
        return completion(str(left + right + (not right_answer)), finish_reason=FinishReason.STOP)

    asked: list[tuple[int, int]] = []
    generate = FakeGenerate(respond)
    policy = ChatPolicy(CharacterTokenizer(), generate, SamplingParams(max_tokens=4, temperature=0.0), max_length=32)
    result = asyncio.run(evaluate(Arithmetic(), policy, num_tasks=40, name="sums", timeout_seconds=30))
    assert {split_of(pair) for pair in asked} == {"heldout"}
    assert len(generate.calls) == 40
    assert result.accuracy == sum(left < 50 for left, _ in asked) / 40
    assert result.levels["2 digits x 2 terms"].num_scored == 40


def test_deadline_names_what_was_not_done():
    class Silent(Arithmetic):
        async def rollouts(self, task: object, num_rollouts: int, policy: object) -> list[Rollout]:
            await asyncio.Event().wait()
            return list(make_group("sums", 0).rollouts)

    policy = ChatPolicy(CharacterTokenizer(), FakeGenerate(lambda *_: completion("1")), SamplingParams(4), max_length=8)
    with pytest.raises(EngineTimeout, match=r"3 heldout tasks of 'sums' were not done in 0\.01 s; raise engine\.req"):
        asyncio.run(evaluate(Silent(), policy, num_tasks=3, name="sums", timeout_seconds=0.01))
