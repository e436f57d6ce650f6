"""Environments written for the real `verifiers`: single turns, tools, games, rubrics; and their faults."""

import asyncio
import json
import signal
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from character_tokenizer import CharacterTokenizer, completion

from syncline.envs.rendering import ChatPolicy
from syncline.errors import ConfigError, EngineTimeout
from syncline.testing import FakeGenerate
from syncline.types import Completion, FinishReason, Rollout, RolloutStatus, SamplingParams

pytest.importorskip("verifiers", reason="the extra `verifiers` is not installed")
from syncline.envs.adapters.verifiers import Verifiers

ENVIRONMENTS = """
    import verifiers as vf
    from datasets import Dataset

    ROWS = [{"question": "2+2", "answer": "4"}, {"question": "2+3", "answer": "5"}]


    def correct(completion, answer, **kwargs):
        return 1.0 if completion[-1]["content"].strip() == answer else 0.0

    async def short(completion):
        return 1.0 / len(completion)

    def picky(completion, **kwargs):
        return {"4": 1.0}[completion[-1]["content"]]

    def nothing(completion, **kwargs):
        return None

    def best(completions, **kwargs) -> list[float]:
        lengths = [len(c[-1]["content"]) for c in completions]
        return [float(n == max(lengths)) for n in lengths]

    def add(a: int, b: int) -> int:
        '''Adds two numbers.'''
        return a + b

    class Guess(vf.MultiTurnEnv):
        async def env_response(self, messages, state, **kwargs):
            if messages[-1]["content"] == state["answer"]:
                state["final_env_response"] = [{"role": "user", "content": "yes"}]
                return state["final_env_response"]
            return [{"role": "user", "content": "no"}]

    def load_environment(kind="single", rewards=("correct", "short"), heldout=True):
        rubric = vf.Rubric([globals()[name] for name in rewards], [1.0, 0.5][: len(rewards)])
        args = {"dataset": Dataset.from_list(ROWS[:1]), "rubric": rubric, "system_prompt": "Be brief."}
        if heldout:
            args["eval_dataset"] = Dataset.from_list(ROWS[1:])
        if kind == "tools":
            return vf.ToolEnv(tools=[add], max_turns=3, **args)
        if kind == "guess":
            return Guess(max_turns=3, **args)
        if kind == "group":
            return vf.EnvGroup([vf.SingleTurnEnv(**args)], env_names=["one"])
        return vf.SingleTurnEnv(**args)
"""


@pytest.fixture(autouse=True)
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "made_for_verifiers.py").write_text(textwrap.dedent(ENVIRONMENTS))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "made_for_verifiers", raising=False)


def build(**env_args: Any) -> Verifiers:
    return Verifiers(env_id="made-for-verifiers", env_args=env_args, correct="correct" if not env_args else None)


def attempts(
    environment: Verifiers, respond: Callable[[str], Completion], *, num: int = 1, max_length: int = 9000
) -> tuple[list[Rollout], FakeGenerate]:
    """`respond` is given everything the model sees, as text."""
    generate = FakeGenerate(lambda prompt, sampling, i: respond("".join(map(chr, prompt))))
    policy = ChatPolicy(CharacterTokenizer(), generate, SamplingParams(max_tokens=99), max_length=max_length)
    return asyncio.run(environment.rollouts(environment.task(0), num, policy)), generate


def said(*answers: str) -> Callable[[str], Completion]:
    left = list(answers)
    return lambda text: completion(left.pop(0))


def test_single_turn_with_its_rubric():
    (right, wrong), generate = attempts(build(), said("4", "5"), num=2)
    assert [(r.status, r.reward) for r in (right, wrong)] == [
        (RolloutStatus.COMPLETED, 1.5),
        (RolloutStatus.COMPLETED, 0.5),
    ]
    assert right.reward_parts == {"correct": 1.0, "short": 1.0, "num_turns": 1.0}
    assert "".join(map(chr, generate.calls[0][0])) == "Be brief.2+2"
    assert [m.role for m in right.messages] == ["system", "user", "assistant"]


def test_tool_is_called_and_the_turns_are_one_sample_of_what_was_sampled():
    call = '<tool_call>\n{"name": "add",  "arguments": {"a": 2, "b": 2}}</tool_call>'
    (rollout,), generate = attempts(build(kind="tools"), said(f"Let me see. {call}", "4"))
    [sample] = rollout.samples
    masked = "".join(chr(t) for t, own in zip(sample.token_ids, sample.loss_mask, strict=True) if own)
    assert masked == f"Let me see. {call}4"
    shown = "".join(map(chr, generate.calls[1][0]))
    assert shown.endswith(f"{call}<tool_response>\n4\n</tool_response>") and '"name": "add"' in shown
    assert (rollout.reward, rollout.reward_parts["add_calls"], rollout.reward_parts["num_turns"]) == (
        pytest.approx(1 + 0.5 / 3), 1.0, 2.0,
    )  # fmt: skip


def test_call_that_is_none_stays_text_and_ends_the_conversation():
    (rollout,), _ = attempts(build(kind="tools"), said("<tool_call>add 2 2</tool_call>"))
    assert (rollout.status, rollout.reward) == (RolloutStatus.COMPLETED, 0.5)


def test_game_goes_on_until_the_environment_ends_it():
    (rollout,), _ = attempts(build(kind="guess"), said("3", "4"))
    [sample] = rollout.samples
    assert "".join(map(chr, sample.token_ids)) == "Be brief.2+23no4"
    assert sample.num_sampled == 2 and rollout.status is RolloutStatus.COMPLETED


def test_group_of_environments_and_functions_that_compare_siblings():
    rollouts, _ = attempts(build(kind="group", rewards=["best"]), said("4", "four"), num=2)
    assert [r.reward for r in rollouts] == [0.0, 1.0]


def test_function_that_raises_is_an_error_where_verifiers_makes_it_zero():
    (good, bad), _ = attempts(build(rewards=["picky"]), said("4", "5"), num=2)
    assert good.reward == 1.0
    assert (bad.status, bad.reward, bad.error) == (RolloutStatus.ERROR, None, "picky raised KeyError: '5'")


def test_function_that_returns_no_number_is_an_error():
    (rollout,), _ = attempts(build(rewards=["nothing"]), said("4"))
    assert rollout.status is RolloutStatus.ERROR and "nothing raised TypeError" in (rollout.error or "")


def test_context_that_ends_is_truncated_and_scored():
    (rollout,), _ = attempts(build(kind="guess"), said("x" * 40, "y" * 40, "z"), max_length=50)
    assert (rollout.status, rollout.samples[0].num_sampled) == (RolloutStatus.TRUNCATED, 40)
    assert rollout.reward is not None


def test_answer_cut_by_length_is_truncated():
    (rollout,), _ = attempts(build(), lambda text: completion("4", finish_reason=FinishReason.LENGTH))
    assert (rollout.status, rollout.reward) == (RolloutStatus.TRUNCATED, 1.5)


def test_abort_has_no_reward():
    (rollout,), _ = attempts(build(), lambda text: completion("4", finish_reason=FinishReason.ABORT))
    assert (rollout.status, rollout.reward) == (RolloutStatus.ABORTED, None)


def test_empty_answer_is_a_poor_one_not_an_error():
    (rollout,), _ = attempts(build(), said(""))
    assert (rollout.status, rollout.reward) == (RolloutStatus.COMPLETED, 0.5)


def test_engines_fault_is_not_taken_for_an_answer():
    def silent(text: str) -> Completion:
        raise EngineTimeout("engine did not answer")

    with pytest.raises(EngineTimeout, match="did not answer"):
        attempts(build(), silent)


def test_heldout_rows_are_its_evaluation_data_set():
    assert build().task(0, split="heldout")["answer"] == "5"
    with pytest.raises(ConfigError, match="made-for-verifiers has no evaluation data set"):
        build(heldout=False).task(0, split="heldout")


def test_signals_stay_the_workers():
    before = signal.getsignal(signal.SIGTERM)
    build()
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({"env_id": "nobody-has-this"}, "env_id: 'nobody-has-this' with {} does not load"),
        ({"env_id": "made-for-verifiers", "env_args": {"x": 1}}, "env_id: .*unexpected keyword argument 'x'"),
    ],
)
def test_environment_that_does_not_load_is_named(args: dict, words: str):
    with pytest.raises(ConfigError, match=words):
        Verifiers(**args)


def test_another_version_is_refused_by_name(monkeypatch: pytest.MonkeyPatch):
    import verifiers

    monkeypatch.setattr(verifiers, "__version__", "0.4.0")
    with pytest.raises(ConfigError, match=r"verifiers 0\.4\.0 has another interface than 0\.1\.10; install that one"):
        build()


def test_few_shot_calls_are_shown_as_text():
    from syncline.envs.adapters.verifiers import _translated

    call = {"id": "x", "type": "function", "function": {"name": "add", "arguments": json.dumps({"a": 1, "b": 2})}}
    messages: Sequence[dict[str, Any]] = [
        {"role": "user", "content": [{"type": "text", "text": "1+2"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "3", "tool_call_id": "x"},
        {"role": "tool", "content": "4", "tool_call_id": "y"},
    ]
    assert [(m.role, m.content) for m in _translated(messages, (), {})] == [
        ("user", "1+2"),
        ("assistant", '<tool_call>{"name": "add", "arguments": {"a": 1, "b": 2}}</tool_call>'),
        ("user", "<tool_response>\n3\n</tool_response>\n<tool_response>\n4\n</tool_response>"),
    ]
