"""Rows with a reward an action: prompts already in Harmony, the last action counts, what has none is left out."""

import asyncio
import csv
from pathlib import Path

import pytest
from gpt_oss_models import recipe

from syncline.config.schema import Environment
from syncline.envs.registry import build_environment
from syncline.envs.rendering import ChatPolicy
from syncline.envs.tasks.thermal_storage import ThermalStorage, chosen_action
from syncline.errors import ConfigError
from syncline.testing import FakeGenerate
from syncline.types import Completion, FinishReason, Message, Rollout, RolloutStatus, SamplingParams, VersionSpan

PROMPT = "<|start|>system<|message|>Valid channels: analysis, final.<|end|><|start|>user<|message|>Store: 2<|end|>"
REWARDS, VALUES = (0.1, 0.6, 0.2, 0.1), (-0.4, -0.1, -0.2, -0.3)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a_harmony.csv", "b_harmony.csv", "other.csv"):
        with (tmp_path / name).open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["prompt", *(f"q_action_{k}" for k in range(4)), *(f"reward_action_{k}" for k in range(4))])
            rows.writerow([PROMPT + name, *VALUES, *REWARDS])
    return tmp_path


def test_every_harmony_file_of_a_folder_is_read(folder: Path) -> None:
    environment = ThermalStorage(path=str(folder))
    tasks = [environment.task(i) for i in range(4)]
    assert {task.prompt for task in tasks} == {f"{PROMPT}{name}_harmony.csv<|start|>assistant" for name in "ab"}
    assert tasks[0].target == 1


@pytest.mark.parametrize(
    ("text", "action"),
    [("[2]", 2), ("[1] or rather [3]", 3), ("analysis [0] is bad final[1]", 1), ("[7]", None), ("2", None), ("", None)],
)
def test_the_last_digit_in_brackets_is_the_action(text: str, action: int | None) -> None:
    assert chosen_action(text) == action


def test_a_row_that_lacks_a_column_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "x", "q_action_0": 1}\n')
    with pytest.raises(ConfigError, match=rf"{path}:1: needs a prompt, and numbers"):
        build_environment(Environment(task="thermal_storage", args={"path": str(path)}), position=0, seed=0)


HEADER = ",".join([*(f"{column}_action_{k}" for column in ("q", "reward") for k in range(4)), "prompt"]).encode()


@pytest.mark.parametrize(
    ("rows", "fault"),
    [
        (b"1,2,3,4,1,2,3,4\n", "rows.csv:2: needs a prompt, .*prompt None"),
        (b'1,2,3,4,1,2,3,4,"a\nb"\n1,2,3,4,1,nan,3,4,b\n', "rows.csv:4: needs a prompt, .*nan"),
        (b"1,2,3,4,1,2,3,4,caf\xe9\n", "rows.csv' cannot be read .*can't decode"),
        (b"1,2,3,4,1,2,3,4," + b"x" * 200_000 + b"\n", "rows.csv' cannot be read .*larger than field limit"),
        (b"", "no training rows"),
    ],
    ids=["without a prompt", "without a number", "another encoding", "too large", "none"],
)
def test_csv_rows_that_are_none_are_refused(tmp_path: Path, rows: bytes, fault: str) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(HEADER + b"\n" + rows)
    with pytest.raises(ConfigError, match=fault):
        ThermalStorage(path=str(path))


def test_csv_as_spreadsheets_write_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(b"\xef\xbb\xbf" + HEADER + b"\r\n1,2,3,4,1,2,3,4,store?\r\n")
    assert ThermalStorage(path=str(path)).task(0).values == (1.0, 2.0, 3.0, 4.0)


TOKENIZER = recipe("small_model").tokenizer()


def attempts(environment: ThermalStorage, *answers: str, cut: bool = False) -> list[Rollout]:
    def respond(prompt: object, sampling: object, i: int) -> Completion:
        ids = tuple(TOKENIZER.encode(answers[i], add_special_tokens=False))
        reason = FinishReason.LENGTH if cut else FinishReason.STOP
        return Completion(ids, (-1.0,) * len(ids), (VersionSpan(0, 0, len(ids)),), reason)

    policy = ChatPolicy(TOKENIZER, FakeGenerate(respond), SamplingParams(max_tokens=64), max_length=512)
    return asyncio.run(environment.rollouts(environment.task(0), len(answers), policy))


def test_prompt_and_reasoning_keep_their_special_tokens_in_the_sample(folder: Path) -> None:
    environment = ThermalStorage(path=str(folder))
    said = "<|channel|>analysis<|message|>maybe [3]<|end|><|start|>assistant<|channel|>final<|message|>[1]<|return|>"
    [rollout] = attempts(environment, said)
    [sample] = rollout.samples
    assert TOKENIZER.decode(sample.token_ids) == environment.task(0).prompt + said
    start, channel = (TOKENIZER.convert_tokens_to_ids(word) for word in ("<|start|>", "<|channel|>"))
    assert (sample.token_ids.count(start), sample.token_ids.count(channel)) == (4, 2)
    assert TOKENIZER.decode([t for t, mask in zip(sample.token_ids, sample.loss_mask, strict=True) if mask]) == said
    assert (rollout.reward, dict(rollout.reward_parts)) == (
        0.6,
        {"reward_fn": 0.6, "action": 1.0, "target_action": 1.0},
    )


@pytest.mark.parametrize(("said", "cut"), [("no idea", False), ("[9]", False), ("[1]", True)])
def test_without_an_action_or_cut_off_a_rollout_is_left_out_or_earns_what_is_asked(
    folder: Path, said: str, cut: bool
) -> None:
    [left_out] = attempts(ThermalStorage(path=str(folder)), said, cut=cut)
    assert (left_out.status, left_out.reward) == (RolloutStatus.ERROR, None)
    [punished] = attempts(ThermalStorage(path=str(folder), invalid_reward=-0.5), said, cut=cut)
    assert (punished.status, punished.reward) == (RolloutStatus.TRUNCATED if cut else RolloutStatus.COMPLETED, -0.5)


def test_messages_go_through_the_chat_template_into_harmony() -> None:
    policy = ChatPolicy(TOKENIZER, FakeGenerate(lambda *_: None), SamplingParams(8), max_length=512)  # type: ignore
    text = TOKENIZER.decode(policy.encode([Message("system", "Be brief."), Message("user", "Hi")]))
    assert text.startswith("<|start|>system<|message|>")
    assert text.endswith(
        "<|start|>developer<|message|>Be brief.<|end|><|start|>user<|message|>Hi<|end|><|start|>assistant"
    )


def test_the_made_data_rewards_the_best_action_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = recipe("thermal_data")
    monkeypatch.setattr("sys.argv", ["thermal_data", "--out", str(tmp_path), "--rows", "12"])
    data.main()
    environment = ThermalStorage(path=str(tmp_path), heldout_path=str(tmp_path / "heldout.csv"))
    tasks = [environment.task(i, split=split) for split in ("train", "heldout") for i in range(12)]
    assert len({task.prompt for task in tasks}) == 24
    assert all(max(task.rewards) == task.rewards[task.target] for task in tasks)
    assert all(abs(sum(task.rewards) - 1) < 1e-3 for task in tasks)
    assert len({task.target for task in tasks}) > 1
