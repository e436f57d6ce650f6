"""What is written of each step, and that a resumed run writes no step twice."""

import json
from itertools import count
from pathlib import Path

import pytest

from syncline.observe.files import read_lines
from syncline.observe.sinks import JsonlSink, MultiSink
from syncline.types import (
    Completion,
    FinishReason,
    Message,
    Rollout,
    RolloutGroup,
    RolloutStatus,
    TrainingSample,
    VersionSpan,
)


def sink(folder: Path, *, resumed_step: int = 0, **options) -> JsonlSink:
    ticks = count(1000)
    return JsonlSink(folder, resumed_step=resumed_step, clock=lambda: float(next(ticks)), **options)


def group(name: str = "g") -> RolloutGroup:
    spans = (VersionSpan(3, 0, 1), VersionSpan(4, 1, 2))
    sample = TrainingSample.from_completion((7, 8), Completion((9, 2), (-0.5, -0.25), spans, FinishReason.STOP))
    said = (Message("user", "2+2="), Message("assistant", "4"))
    right = Rollout((sample,), 1.0, RolloutStatus.COMPLETED, {"correct": 1.0}, said)
    failed = Rollout((), None, RolloutStatus.ERROR, error="the engine went away")
    return RolloutGroup(name, "arithmetic", 5, (failed, right))


def steps(folder: Path, name: str = "metrics.jsonl") -> list[int]:
    return [line["step"] for line in read_lines(folder / name)]


def test_a_step_is_one_line_and_is_there_at_once(tmp_path: Path) -> None:
    written = sink(tmp_path)
    written.log(1, {"reward": 0.5, "kl": float("nan")})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "time": 1000.0, "reward": 0.5, "kl": null}\n'
    written.close()


def test_steps_must_grow(tmp_path: Path) -> None:
    written = sink(tmp_path, resumed_step=4)
    with pytest.raises(ValueError, match="step 4 is logged after step 4"):
        written.log(4, {})


def test_resuming_cuts_later_steps_and_a_torn_line(tmp_path: Path) -> None:
    first = sink(tmp_path)
    for step in (1, 2, 3, 4):
        first.log(step, {"reward": step / 10})
        first.log_rollouts(step, [group()], {"g": [0.0, 1.0]})
    first.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "rew')
    resumed = sink(tmp_path, resumed_step=2)
    assert steps(tmp_path) == [1, 2]
    assert steps(tmp_path, "rollouts.jsonl") == [1, 2]
    resumed.log(3, {"reward": 0.9})
    resumed.close()
    assert [line["reward"] for line in read_lines(tmp_path / "metrics.jsonl")] == [0.1, 0.2, 0.9]


def test_a_torn_line_of_a_step_that_was_kept_is_cut(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "time": 1}\n{"step": 2, "ti')
    sink(tmp_path, resumed_step=2).log(3, {})
    assert steps(tmp_path) == [1, 3]


def test_a_new_run_starts_from_nothing(tmp_path: Path) -> None:
    sink(tmp_path).log(1, {})
    sink(tmp_path, resumed_step=0)
    assert steps(tmp_path) == []


def test_rollouts_are_told_for_people(tmp_path: Path) -> None:
    sink(tmp_path, num_groups=1).log_rollouts(6, [group("g"), group("h")], {"g": [0.0, 1.5], "h": [0.0, 1.0]})
    (line,) = read_lines(tmp_path / "rollouts.jsonl")
    failed, right = line.pop("rollouts")
    assert line == {
        "step": 6,
        "group_id": "g",
        "environment": "arithmetic",
        "task_index": 5,
        "prompt": [{"role": "user", "content": "2+2="}],
    }
    assert right == {
        "completion": "4",
        "reward": 1.0,
        "advantage": 1.5,
        "status": "completed",
        "reward_parts": {"correct": 1.0},
        "num_tokens": 2,
        "versions": [3, 4],
        "error": None,
    }
    assert (failed["completion"], failed["reward"], failed["error"]) == (None, None, "the engine went away")


def test_every_rollout_has_an_advantage(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="zip"):
        sink(tmp_path).log_rollouts(1, [group()], {"g": [1.0]})


def test_tokens_are_kept_where_somebody_knows_what_they_say(tmp_path: Path) -> None:
    written = sink(tmp_path, decode=lambda ids: "".join(chr(ord("a") + i) for i in ids))
    written.log_rollouts(1, [group()], {"g": [0.0, 1.0]})
    failed, right = read_lines(tmp_path / "rollouts.jsonl")[0]["rollouts"]
    assert "tokens" not in failed
    assert right["tokens"] == {"texts": ["j", "c"], "logprobs": [-0.5, -0.25], "versions": [3, 4], "num_left_out": 0}


def test_several_sinks_get_the_same(tmp_path: Path) -> None:
    both = MultiSink([sink(tmp_path / "a"), sink(tmp_path / "b")])
    both.log(1, {"reward": 1.0})
    both.log_rollouts(1, (g for g in [group()]), {"g": [0.0, 1.0]})
    both.close()
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        a, b = ((tmp_path / folder / name).read_text() for folder in "ab")
        assert json.loads(a) == json.loads(b), "a generator of groups reaches both"
