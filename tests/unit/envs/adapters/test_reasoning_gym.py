"""Every task of the installed library: made twice alike, held-out apart, its own answers given full marks."""

import asyncio
from typing import Any

import pytest
from character_tokenizer import CharacterTokenizer, completion

from syncline.config.schema import Environment as EnvironmentConfig
from syncline.envs.adapters.reasoning_gym import ReasoningGym
from syncline.envs.registry import build_environment
from syncline.envs.rendering import ChatPolicy
from syncline.envs.single_turn import hashed_split
from syncline.errors import ConfigError
from syncline.testing import FakeGenerate
from syncline.types import SamplingParams

pytest.importorskip("reasoning_gym", reason="the extra `reasoning-gym` is not installed")


EVERY_TIME = ("basic_arithmetic", "bf", "countdown", "game_of_life", "leg_counting", "rubiks_cube", "tower_of_hanoi")


def names() -> list[Any]:
    """All but `composite`, which has no task of its own; the many are `slow` (a minute together)."""
    from reasoning_gym.factory import DATASETS

    rest = sorted(set(DATASETS) - {"composite", *EVERY_TIME})
    return [*EVERY_TIME, *(pytest.param(name, marks=pytest.mark.slow) for name in rest)]


NO_ORACLE = ("boxnet", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour")
"""They have no reference answer of their own that they would accept."""


@pytest.mark.parametrize("name", names())
def test_task_is_reproduced_and_scored_by_its_own_verifier(name: str):
    one, other = (ReasoningGym(dataset=name, seed=7) for _ in range(2))
    task = one.task(3)
    assert other.task(3)["question"] == task["question"]
    assert hashed_split(one.task(0, split="heldout")["question"]) == "heldout" != hashed_split(task["question"])
    if name not in NO_ORACLE:
        right = one.score(task, f"so <answer>{task['answer']}</answer>")
        assert right.parts == {"correct": 1.0, "score": 1.0, "format": 1.0}
    nothing = one.score(task, "no idea")
    assert nothing.parts["correct"] == nothing.parts["format"] == 0.0 and nothing.reward < 0.05


def test_trains_through_the_registry_with_its_own_options():
    config = EnvironmentConfig(
        task="reasoning_gym", args={"dataset": "leg_counting", "config": {"min_animals": 2, "max_animals": 2}}
    )
    environment = build_environment(config, position=0, seed=5)
    task = environment.task(0)
    assert task["metadata"]["difficulty"]["num_animals"][1] == 2
    answers = [f"<answer>{task['answer']}</answer>", "<answer>-1</answer>"]
    policy = ChatPolicy(
        CharacterTokenizer(), FakeGenerate(lambda p, s, i: completion(answers[i])), SamplingParams(99), max_length=9999
    )
    right, wrong = asyncio.run(environment.rollouts(task, 2, policy))
    assert (right.reward, wrong.reward) == (1.0, 0.0)
    assert "<answer>" in right.messages[0].content, "the library's own system prompt"


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({"dataset": "leg_countin"}, "dataset: reasoning-gym makes no 'leg_countin'.*not registered"),
        ({"dataset": "leg_counting", "config": {"legs": 3}}, "dataset: .*unexpected keyword argument 'legs'"),
        ({"dataset": "leg_counting", "config": {"max_animals": -1}}, "dataset: reasoning-gym makes no"),
        ({"dataset": "leg_counting", "config": {"seed": 1}}, r"config: \['seed'\] are chosen by the index"),
        ({"dataset": "leg_counting", "weights": {"legs": 1.0}}, "weights"),
    ],
)
def test_unusable_arguments_are_refused_by_name(args: dict, words: str):
    with pytest.raises(ConfigError, match=words):
        ReasoningGym(**args)
