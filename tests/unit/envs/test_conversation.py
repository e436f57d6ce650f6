"""Turns over a real tokenizer: what was sampled is what is trained on, whatever a template makes of the history."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from character_tokenizer import CharacterTokenizer, completion
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from syncline.envs.conversation import Conversation, converse, score_each
from syncline.envs.multi_turn import MultiTurn
from syncline.envs.rendering import ChatPolicy
from syncline.envs.scoring import Score
from syncline.errors import EngineTimeout
from syncline.testing import FakeGenerate, ScriptedPolicy
from syncline.types import Completion, FinishReason, Message, Rollout, RolloutStatus, SamplingParams, VersionSpan

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WITHOUT_THOUGHTS = CHATML.replace(
    "{{ m.content }}", "{{ m.content.split('</think>')[-1] if not loop.last else m.content }}"
)
"""As reasoning models' templates do: earlier thoughts are left out of the history."""
TRIMMING = CHATML.replace("{{ m.content }}", "{{ m.content | trim }}")
CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789 \n<>/?!"


@pytest.fixture
def tokenizer() -> Any:
    """Knows `ab` as one token: a model that samples `a`, then `b`, has sampled what the tokenizer would never make."""
    vocabulary = {token: i for i, token in enumerate([*CHARACTERS, "ab", "<|im_start|>", "<|im_end|>"])}
    pairs = Tokenizer(models.BPE(vocabulary, [("a", "b")]))
    pairs.decoder = decoders.Fuse()
    pairs.add_special_tokens([AddedToken(t, special=True) for t in ("<|im_start|>", "<|im_end|>")])
    built = PreTrainedTokenizerFast(tokenizer_object=pairs, eos_token="<|im_end|>")
    built.chat_template = CHATML
    return built


def sampled(tokenizer: Any, *tokens: str, policy_version: int = 0, end: FinishReason = FinishReason.STOP) -> Completion:
    ids = tuple(tokenizer.convert_tokens_to_ids(list(tokens)))
    return Completion(
        ids, tuple(-0.1 * (i + 1) for i in range(len(ids))), (VersionSpan(policy_version, 0, len(ids)),), end
    )


def talk(
    tokenizer: Any, answers: Sequence[Completion], *, reply: str = "so?", max_length: int = 500
) -> tuple[Conversation, FakeGenerate]:
    """One attempt in which every answer but the last is replied to."""
    left = list(answers)
    generate = FakeGenerate(lambda prompt, sampling, i: left.pop(0))
    policy = ChatPolicy(tokenizer, generate, SamplingParams(max_tokens=50), max_length=max_length)
    say = lambda said: [Message("user", reply)] if left else []  # noqa: E731
    [attempt] = asyncio.run(converse(policy, [Message("user", "hi")], 1, reply=say, max_turns=9))
    return attempt, generate


def test_turns_are_one_sample_of_the_very_tokens_that_were_sampled(tokenizer: Any):
    first = sampled(tokenizer, "a", "b", "c", "<|im_end|>", policy_version=3)
    second = sampled(tokenizer, "ab", "<|im_end|>", policy_version=4)
    attempt, generate = talk(tokenizer, [first, second])
    [sample] = attempt.samples
    assert tokenizer.decode(list(sample.token_ids)) == (
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nabc<|im_end|>\n"
        "<|im_start|>user\nso?<|im_end|>\n<|im_start|>assistant\nab<|im_end|>"
    )
    masked = [token for token, own in zip(sample.token_ids, sample.loss_mask, strict=True) if own]
    assert tokenizer.convert_ids_to_tokens(masked) == ["a", "b", "c", "<|im_end|>", "ab", "<|im_end|>"]
    assert [x for x, own in zip(sample.logprobs, sample.loss_mask, strict=True) if own] == [
        *first.logprobs,
        *second.logprobs,
    ]
    assert {x for x, own in zip(sample.logprobs, sample.loss_mask, strict=True) if not own} == {0.0}
    assert [v.policy_version for v in sample.versions] == [3, 4]
    assert generate.calls[1][0] == sample.token_ids[: len(generate.calls[1][0])], "the engine saw what is trained on"


def test_retokenized_history_would_have_been_another(tokenizer: Any):
    """The trap itself: the template's own tokens for the same text hold `ab` as one."""
    attempt, generate = talk(
        tokenizer, [sampled(tokenizer, "a", "b", "<|im_end|>"), sampled(tokenizer, "c", "<|im_end|>")]
    )
    chat = [{"role": m.role, "content": m.content} for m in attempt.messages[:-1]]
    rendered = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert tokenizer.decode(rendered) == tokenizer.decode(list(generate.calls[1][0]))
    assert tuple(rendered) != generate.calls[1][0]


def test_template_that_leaves_thoughts_out_begins_a_new_sample(tokenizer: Any):
    tokenizer.chat_template = WITHOUT_THOUGHTS
    thought = sampled(tokenizer, *"<think>no</think>c", "<|im_end|>")
    attempt, generate = talk(tokenizer, [thought, sampled(tokenizer, "d", "<|im_end|>")])
    first, second = attempt.samples
    assert "<think>no</think>c" in tokenizer.decode(list(first.token_ids))
    assert "think" not in tokenizer.decode(list(second.token_ids))
    assert (first.num_sampled, second.num_sampled) == (len(thought.token_ids), 2)
    assert generate.calls[1][0] == second.token_ids[:-2]


def test_template_that_trims_an_answer_begins_a_new_sample_only_then(tokenizer: Any):
    tokenizer.chat_template = TRIMMING
    plain, _ = talk(tokenizer, [sampled(tokenizer, "c", "<|im_end|>"), sampled(tokenizer, "d", "<|im_end|>")])
    spaced, _ = talk(tokenizer, [sampled(tokenizer, "c", " ", "<|im_end|>"), sampled(tokenizer, "d", "<|im_end|>")])
    assert (len(plain.samples), len(spaced.samples)) == (1, 2)


def test_without_a_template_text_follows_text(tokenizer: Any):
    tokenizer.chat_template = None
    attempt, generate = talk(tokenizer, [sampled(tokenizer, "a", "b", "<|im_end|>"), sampled(tokenizer, "c")])
    [sample] = attempt.samples
    assert tokenizer.decode(list(sample.token_ids)) == "hiab<|im_end|>so?c"
    assert sample.num_sampled == 4 and len(generate.calls) == 2


def test_group_shares_its_first_prompt_and_then_goes_separate_ways():
    replies = {"a": "x", "b": "y"}
    generate = FakeGenerate(lambda prompt, sampling, i: completion("ab"[i] if len(prompt) == 2 else "!"))
    policy = ChatPolicy(CharacterTokenizer(), generate, SamplingParams(max_tokens=5), max_length=50)
    say = lambda said: [Message("user", replies[said[-1].content])] if said[-1].content in replies else []  # noqa: E731
    attempts = asyncio.run(converse(policy, [Message("user", "hi")], 2, reply=say, max_turns=3))
    assert [n for _, _, n in generate.calls] == [2, 1, 1]
    assert ["".join(m.content for m in attempt.messages) for attempt in attempts] == ["hiax!", "hiby!"]


def test_no_room_for_another_turn_is_truncated_and_scored(tokenizer: Any):
    attempt, _ = talk(tokenizer, [sampled(tokenizer, "c", "<|im_end|>")] * 3, reply="x" * 50, max_length=70)
    [rollout] = asyncio.run(score_each([attempt], lambda a: Score(1.0)))
    assert (rollout.status, rollout.reward, len(rollout.samples)) == (RolloutStatus.TRUNCATED, 1.0, 1)
    assert rollout.samples[0].num_sampled == 2


def test_answer_cut_by_length_is_not_replied_to(tokenizer: Any):
    attempt, generate = talk(tokenizer, [sampled(tokenizer, "c", end=FinishReason.LENGTH), sampled(tokenizer, "d")])
    assert len(generate.calls) == 1 and attempt.over


class Guess(MultiTurn):
    """Guess a number; the world says higher or lower."""

    name = "guess"
    max_turns = 3

    def task(self, index: int, *, split: str = "train") -> int:
        return index

    def prompt(self, task: int) -> list[Message]:
        return [Message("user", "?")]

    async def reply(self, task: int, messages: Sequence[Message]) -> list[Message]:
        guess = int(messages[-1].content)
        return [] if guess == task else [Message("user", "<" if guess > task else ">")]

    def score(self, task: int, messages: Sequence[Message]) -> Score:
        return Score(float(messages[-1].content == str(task)))


def play(environment: MultiTurn, respond: Callable[[str], Completion], *, num: int = 1) -> list[Rollout]:
    generate = FakeGenerate(lambda prompt, sampling, i: respond("".join(map(chr, prompt))))
    policy = ChatPolicy(CharacterTokenizer(), generate, SamplingParams(max_tokens=5), max_length=50)
    return asyncio.run(environment.rollouts(environment.task(7), num, policy))


def test_game_is_played_to_its_end():
    [rollout] = play(Guess(), lambda said: completion({"?": "9", "?9<": "7"}[said]))
    assert (rollout.status, rollout.reward) == (RolloutStatus.COMPLETED, 1.0)
    assert [m.content for m in rollout.messages] == ["?", "9", "<", "7"]
    assert rollout.samples[0].loss_mask == (False, True, False, True)


def test_out_of_turns_is_truncated_and_scored():
    [rollout] = play(Guess(), lambda said: completion("9"))
    assert (rollout.status, rollout.reward, rollout.samples[0].num_sampled) == (RolloutStatus.TRUNCATED, 0.0, 3)


@pytest.mark.parametrize("said", ["what?", Message("user", "what?"), ["what?"]])
def test_reply_that_is_no_list_of_messages_is_an_error_of_its_attempt(said: object):
    policy = ScriptedPolicy(lambda seen: "so?")
    conversations = converse(policy, [Message("user", "hi")], 1, reply=lambda _: said, max_turns=2)  # type: ignore
    [attempt] = asyncio.run(conversations)
    assert (attempt.fault or "").startswith("reply raised TypeError: reply() must return a list of messages, got ")
    assert len(attempt.messages) == 2


def test_reply_that_raises_is_an_error_of_that_attempt_alone():
    answers = iter(["x", "7"])
    bad, good = play(Guess(), lambda said: completion(next(answers)), num=2)
    assert (bad.status, bad.reward) == (RolloutStatus.ERROR, None)
    assert "reply raised ValueError: invalid literal" in (bad.error or "")
    assert good.reward == 1.0


def test_abort_in_a_later_turn_has_no_reward_and_keeps_what_was_sampled():
    end = {"?": FinishReason.STOP, "?9<": FinishReason.ABORT}
    [rollout] = play(Guess(), lambda said: completion("9", finish_reason=end[said]))
    assert (rollout.status, rollout.reward, rollout.samples[0].num_sampled) == (RolloutStatus.ABORTED, None, 2)


def test_engine_error_in_one_attempt_ends_the_group_and_the_others():
    def respond(said: str) -> Completion:
        if said == "?9<":
            raise EngineTimeout("engine did not answer")
        return completion("9")

    with pytest.raises(EngineTimeout):
        play(Guess(), respond, num=2)
