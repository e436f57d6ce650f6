"""What an environment with right answers owes: pure tasks, disjoint splits, scores that are right and never raise."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from character_tokenizer import CharacterTokenizer, completion

from syncline.config.schema import Environment as EnvironmentConfig
from syncline.envs.registry import build_environment
from syncline.envs.rendering import ChatPolicy
from syncline.protocols import Environment
from syncline.testing import FakeGenerate
from syncline.types import FinishReason, Rollout, RolloutStatus, SamplingParams

ROWS = (Path(__file__).parents[1] / "golden" / "gsm8k_rows.jsonl").read_text().splitlines()
GARBAGE = (
    "",
    " ",
    "\x00\ud7ff",
    "\\boxed{",
    "\\boxed{}" * 1000,
    "\\boxed{9^{9^{9^{9}}}}",
    "####",
    "\\boxed{\\frac{1}{0}}",
    "-",
    "١٢",
    "1" * 10_000,
    "12+",
    "\\boxed{nan} #### inf",
    "{" * 500,
)


@dataclass(frozen=True)
class Case:
    """A built-in, how to build it, how its right answer is written, and how many held-out tasks it has to show."""

    task: str
    args: dict[str, Any]
    right: Callable[[Any], str]
    num_heldout: int


@pytest.fixture(params=["arithmetic", "gsm8k"])
def case(request: pytest.FixtureRequest, tmp_path: Path) -> Case:
    if request.param == "arithmetic":
        args = {"operations": ["+", "-", "*"], "levels": [{"digits": 1}, {"digits": 3, "terms": 4}]}
        return Case("arithmetic", args, lambda task: str(task.answer), 30)
    (tmp_path / "train.jsonl").write_text("\n".join(ROWS[:3]))
    (tmp_path / "test.jsonl").write_text("\n".join(ROWS[3:]))
    args = {"path": str(tmp_path / "train.jsonl"), "heldout_path": str(tmp_path / "test.jsonl")}
    return Case("gsm8k", args, lambda task: f"\\boxed{{{task.answer}}}", 2)


def build(case: Case, *, seed: int = 1) -> Environment:
    return build_environment(EnvironmentConfig(task=case.task, args=case.args), position=0, seed=seed)


def attempts(case: Case, texts: tuple[str, ...], *, finish_reason: FinishReason = FinishReason.STOP) -> list[Rollout]:
    environment = build(case)
    generate = FakeGenerate(lambda prompt, sampling, i: completion(texts[i], finish_reason=finish_reason))
    policy = ChatPolicy(CharacterTokenizer(), generate, SamplingParams(max_tokens=16), max_length=4096)
    return asyncio.run(environment.rollouts(environment.task(0), len(texts), policy))


def test_task_is_a_pure_function_of_seed_index_and_split(case: Case):
    one, other, indices = build(case), build(case), range(60)
    assert [one.task(i) for i in indices] == [other.task(i) for i in reversed(indices)][::-1]
    assert [one.task(i) for i in indices] != [build(case, seed=2).task(i) for i in indices]


def test_splits_are_disjoint(case: Case):
    environment = build(case)
    train = {repr(environment.task(i)) for i in range(2000)}
    heldout = {repr(environment.task(i, split="heldout")) for i in range(case.num_heldout)}
    assert heldout
    assert not train & heldout


def test_training_is_endless(case: Case):
    assert build(case).task(10**9) == build(case).task(10**9)


def test_unknown_split_is_refused(case: Case):
    with pytest.raises(Exception, match="split: 'test' is not one of train, heldout"):
        build(case).task(0, split="test")


def test_right_answer_beats_wrong_beats_nothing(case: Case):
    task = build(case).task(0)
    right, wrong, nothing = attempts(
        case, (case.right(task), case.right(task).replace(str(task.answer), "123456789"), "")
    )
    assert (right.reward, right.reward_parts["correct"], right.reward_parts["format"]) == (1.0, 1.0, 1.0)
    assert (wrong.reward, wrong.reward_parts["correct"], wrong.reward_parts["format"]) == (0.0, 0.0, 1.0)
    assert (nothing.reward, nothing.reward_parts["format"]) == (0.0, 0.0)


def test_garbage_is_scored_never_raised(case: Case):
    rollouts = attempts(case, GARBAGE)
    assert [(r.status, r.error) for r in rollouts] == [(RolloutStatus.COMPLETED, None)] * len(GARBAGE)
    assert {r.reward for r in rollouts} == {0.0}


def test_status_follows_the_finish_reason(case: Case):
    (cut,) = attempts(case, ("1",), finish_reason=FinishReason.LENGTH)
    (aborted,) = attempts(case, ("1",), finish_reason=FinishReason.ABORT)
    assert (cut.status, cut.reward) == (RolloutStatus.TRUNCATED, 0.0)
    assert (aborted.status, aborted.reward) == (RolloutStatus.ABORTED, None)
