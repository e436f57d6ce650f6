"""Reward functions as TRL calls them: its own shipped ones, and every form its documentation allows."""

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from character_tokenizer import CharacterTokenizer, completion

from syncline.envs.adapters.trl_rewards import TrlRewards
from syncline.envs.rendering import ChatPolicy
from syncline.errors import ConfigError
from syncline.testing import FakeGenerate
from syncline.types import FinishReason, Rollout, RolloutStatus, SamplingParams

PLAIN = {"prompt": "2+2=", "answer": "4", "kind": "sum"}
CHAT = {"prompt": [{"role": "user", "content": "2+2="}], "solution": "$4$"}


def length(completions: list[str], **kwargs: Any) -> list[float]:
    return [float(len(text)) for text in completions]


def right(prompts: list[str], completions: list[str], answer: list[str], **kwargs: Any) -> list[float]:
    assert prompts == ["2+2="] * len(completions)
    return [float(text == gold) for text, gold in zip(completions, answer, strict=True)]


async def slow(completions: list[str], **kwargs: Any) -> list[float]:
    await asyncio.sleep(0)
    return [0.5] * len(completions)


def only_for_code(completions: list[str], kind: list[str], **kwargs: Any) -> list[float | None]:
    return [1.0 if one == "code" else None for one in kind]


def only_short(completions: list[str], **kwargs: Any) -> list[float | None]:
    return [1.0 if len(text) == 1 else None for text in completions]


def tokens(completions: list[str], completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
    kwargs["log_metric"]("seen", float(len(completion_ids)))
    return [float(sum(ids)) for ids in completion_ids]


def broken(completions: list[str], **kwargs: Any) -> list[float]:
    raise KeyError("no such unit")


def too_few(completions: list[str], **kwargs: Any) -> list[float]:
    return [1.0]


def build(tmp_path: Path, *rewards: str, row: dict = PLAIN, **args: Any) -> TrlRewards:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row) + "\n")
    own = [reward if ":" in reward else f"test_trl_rewards:{reward}" for reward in rewards]
    return TrlRewards(rewards=own, path=str(file), **args)


def attempts(environment: TrlRewards, *answers: str, aborted: Sequence[int] = ()) -> list[Rollout]:
    end = [FinishReason.ABORT if i in aborted else FinishReason.STOP for i in range(len(answers))]
    generate = FakeGenerate(lambda prompt, sampling, i: completion(answers[i], finish_reason=end[i]))
    policy = ChatPolicy(CharacterTokenizer(), generate, SamplingParams(max_tokens=99), max_length=999)
    return asyncio.run(environment.rollouts(environment.task(0), len(answers), policy))


def test_columns_weights_and_several_functions_sync_and_async(tmp_path: Path):
    environment = build(tmp_path, "right", "length", "slow", weights=[1.0, 0.1, 2.0])
    rollouts = attempts(environment, "4", "five")
    assert [r.reward for r in rollouts] == pytest.approx([1 + 0.1 + 1, 0 + 0.4 + 1])
    assert rollouts[0].reward_parts == {"right": 1.0, "length": 1.0, "slow": 0.5}


def test_none_leaves_a_function_out_of_that_attempts_reward(tmp_path: Path):
    rollouts = attempts(build(tmp_path, "only_for_code", "only_short", "right"), "4", "five")
    assert [r.reward_parts for r in rollouts] == [{"only_short": 1.0, "right": 1.0}, {"right": 0.0}]


def test_attempt_to_which_nothing_applies_is_an_error_not_a_zero(tmp_path: Path):
    good, none = attempts(build(tmp_path, "only_short"), "4", "five")
    assert good.reward == 1.0
    assert (none.status, none.reward) == (RolloutStatus.ERROR, None)
    assert "no reward function applies" in (none.error or "")


def test_completion_ids_and_logged_metrics(tmp_path: Path):
    first, _ = attempts(build(tmp_path, "tokens"), "4", "44")
    assert first.reward_parts == {"tokens": float(ord("4")), "seen": 2.0}


@pytest.mark.parametrize(
    ("reward", "words"), [("broken", "KeyError: 'no such unit'"), ("too_few", "returned 1 rewards")]
)
def test_function_that_fails_is_an_error_of_the_group(tmp_path: Path, reward: str, words: str):
    for rollout in attempts(build(tmp_path, "right", reward), "4", "5"):
        assert (rollout.status, rollout.reward) == (RolloutStatus.ERROR, None)
        assert words in (rollout.error or "")


def test_aborted_attempt_is_not_shown_to_the_functions(tmp_path: Path):
    aborted, good = attempts(build(tmp_path, "too_few"), "4", "5", aborted=[0])
    assert (aborted.status, good.reward) == (RolloutStatus.ABORTED, 1.0)


def test_trls_own_reward_functions(tmp_path: Path):
    pytest.importorskip("trl", reason="the extra `trl` is not installed")
    row = {"prompt": CHAT["prompt"], "solution": CHAT["solution"]}
    environment = build(tmp_path, "trl.rewards:accuracy_reward", "trl.rewards:think_format_reward", row=row)
    thought = "<think>\n2+2\n</think>\nIt is \\boxed{4}."
    right, wrong = attempts(environment, thought, "It is \\boxed{5}.")
    assert right.reward_parts == {"accuracy_reward": 1.0, "think_format_reward": 1.0}
    assert wrong.reward_parts == {"accuracy_reward": 0.0, "think_format_reward": 0.0}


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({"rewards": []}, "rewards: .* must name one or more"),
        ({"rewards": ["test_trl_rewards:rigth"]}, "rewards: 'test_trl_rewards:rigth' does not import"),
        ({"rewards": ["right"]}, "rewards: 'right' is not a function"),
        ({"rewards": ["test_trl_rewards:right"] * 2}, "functions of different names"),
        ({"rewards": ["test_trl_rewards:right"], "weights": [1, 2]}, "weights: .* must be 1 finite numbers"),
        ({"rewards": ["test_trl_rewards:right"]}, "path: missing; give a JSONL file, or dataset"),
    ],
)
def test_unusable_arguments_are_refused_by_name(args: dict, words: str):
    with pytest.raises(ConfigError, match=words):
        TrlRewards(**args)


@pytest.mark.parametrize(
    "row", [{"question": "x"}, {"prompt": ""}, {"prompt": [{"role": "user"}]}, {"prompt": []}, [1]]
)
def test_row_without_a_prompt_is_named_by_line(tmp_path: Path, row: Any):
    with pytest.raises(ConfigError, match=r"rows\.jsonl:1: field 'prompt' must be"):
        build(tmp_path, "right", row=row)
