"""Calls in a model's text, what comes back, and whose fault each fault is."""

import asyncio
import json
from typing import Any

import pytest
from character_tokenizer import CharacterTokenizer, completion

from syncline.envs.conversation import shown
from syncline.envs.rendering import ChatPolicy
from syncline.envs.scoring import Score
from syncline.envs.single_turn import SingleTurn
from syncline.envs.toolbox import Toolbox, build_toolbox
from syncline.errors import ConfigError
from syncline.testing import FakeGenerate, ScriptedPolicy
from syncline.types import ImageRef, Message, Rollout, RolloutStatus, SamplingParams


def lookup(word: str, language: str = "en") -> str:
    """
    Looks a word up.

    Args:
        word: The word
        language: Its language
    """
    if word == "gone":
        raise ConnectionError("the dictionary is down")
    return f"{word} in {language}"


class Asked(SingleTurn):
    name = "asked"

    def __init__(self, toolbox: Toolbox | None) -> None:
        self.toolbox = toolbox

    def task(self, index: int, *, split: str = "train") -> str:
        return "ask"

    def prompt(self, task: str) -> list[Message]:
        return [Message("user", task)]

    def score(self, task: str, text: str) -> Score:
        return Score(float(text == "done"))


def call(name: str, **arguments: Any) -> str:
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"


def attempt(*answers: str, toolbox: Toolbox | None = None) -> Rollout:
    left = list(answers)
    generate = FakeGenerate(lambda prompt, sampling, i: completion(left.pop(0)))
    policy = ChatPolicy(CharacterTokenizer(), generate, SamplingParams(max_tokens=900), max_length=9000)
    [rollout] = asyncio.run(Asked(toolbox or Toolbox([lookup], max_turns=3)).rollouts("ask", 1, policy))
    return rollout


def answered(*calls: str) -> str:
    """What the model is told after these calls."""
    rollout = attempt("".join(calls), "done")
    assert rollout.status is RolloutStatus.COMPLETED
    return rollout.messages[2].content


def test_prompt_describes_the_tools_and_the_last_answer_is_scored():
    rollout = attempt(f"let me see {call('lookup', word='tree')}", "done")
    schema = json.loads(rollout.messages[0].content.split("<tools>\n")[1].split("\n")[0])
    assert schema["parameters"]["required"] == ["word"]
    assert rollout.messages[0].content.endswith("ask")
    assert rollout.messages[2] == Message("user", "<tool_response>\ntree in en\n</tool_response>")
    assert rollout.reward == 1.0
    sample = rollout.samples[0]
    assert "".join(chr(t) for t, own in zip(sample.token_ids, sample.loss_mask, strict=True) if own) == (
        rollout.messages[1].content + "done"
    )


def test_several_calls_are_answered_in_order():
    said = answered(call("lookup", word="a"), call("lookup", word="b", language="de"))
    assert said.index("a in en") < said.index("b in de")


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ("<tool_call>lookup</tool_call>", "Error: a call must be one JSON object"),
        ("<tool_call>[1]</tool_call>", "Error: a call must look like"),
        ('<tool_call>{"name": "lookup", "arguments": "x"}</tool_call>', "Error: a call must look like"),
        (call("look", word="x"), "Error: there is no tool 'look'; there are: lookup"),
        (call("lookup", wrd="x"), "Error: lookup: missing a required argument: 'word'"),
        (call("lookup", word=5), "Error: lookup: word = 5: Input should be a valid string"),
        (call("lookup", word=None), "Error: lookup: word = None: Input should be a valid string"),
        ('<tool_call>{"name": ' + "9" * 5_000 + "}</tool_call>", "Error: a call must be one JSON object"),
        ("<tool_call>" + "[" * 3_000 + "</tool_call>", "Error: a call must be one JSON object"),
    ],
)
def test_models_mistake_is_told_to_the_model(asked: str, told: str):
    assert told in answered(asked)


def test_tools_own_fault_is_an_error_status_not_a_poor_answer():
    rollout = attempt(call("lookup", word="gone"), "done")
    assert (rollout.status, rollout.reward) == (RolloutStatus.ERROR, None)
    assert "ConnectionError: the dictionary is down" in (rollout.error or "")


def test_call_in_the_last_turn_is_truncated():
    rollout = attempt(*[call("lookup", word="x")] * 3)
    assert (rollout.status, rollout.reward) == (RolloutStatus.TRUNCATED, 0.0)


def test_calculator_and_python_by_name():
    toolbox = build_toolbox(["calculator", "python"], max_turns=3, sandbox={"seconds": 60})
    asked = (
        call("calculator", expression="6*7") + call("python", code="print(6*8)") + call("calculator", expression="?")
    )
    said = attempt(asked, "done", toolbox=toolbox).messages[2].content
    assert "\n42\n" in said and "\n48\n" in said and "Error: invalid syntax" in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"names": ["abacus"]}, "tools: 'abacus' is not a function"),
        ({"names": ["no_such_module:tool"]}, "tools: 'no_such_module:tool' does not import"),
        ({"names": ["test_toolbox:answered"]}, "tools: .*answered"),
        ({"names": ["calculator"], "max_turns": 1}, "max_turns: 1 leaves no turn"),
        ({"names": ["calculator"], "sandbox": {"seconds": 3}}, "sandbox: .* limits the tool `python`"),
    ],
)
def test_unusable_tools_are_refused_by_name(arguments: dict[str, Any], words: str):
    with pytest.raises(ConfigError, match=words):
        build_toolbox(**{"max_turns": 3, **arguments})


def test_images_of_the_prompt_stay_with_it():
    image = ImageRef("a.png", "0" * 64)
    [conversation] = asyncio.run(
        Toolbox([lookup]).converse(ScriptedPolicy(lambda seen: "done"), [Message("user", "what is it?", (image,))], 1)
    )
    assert shown(conversation.messages) == (image,) == conversation.samples[0].images


def test_no_names_no_toolbox():
    assert build_toolbox([], max_turns=4) is None
