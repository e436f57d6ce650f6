"""A value that exists is a valid value."""

import math

import pytest

from syncline.types import (
    Completion,
    FinishReason,
    Message,
    Rollout,
    RolloutGroup,
    RolloutStatus,
    SamplingParams,
    TrainingSample,
    VersionSpan,
)


def sample(**fields) -> TrainingSample:
    values = {
        "token_ids": (1, 2, 3, 4, 5),
        "loss_mask": (False, True, True, False, True),
        "logprobs": (0.0, -0.5, -0.25, 0.0, -1.0),
        "versions": (VersionSpan(3, 1, 2), VersionSpan(4, 2, 3), VersionSpan(4, 4, 5)),
    }
    return TrainingSample(**(values | fields))


def test_a_completion_becomes_a_sample_with_its_spans_moved_behind_the_prompt() -> None:
    completion = Completion(
        (7, 8, 9), (-1.0, -2.0, -3.0), (VersionSpan(0, 0, 2), VersionSpan(1, 2, 3)), FinishReason.STOP
    )
    made = TrainingSample.from_completion((5, 6), completion)
    assert made.token_ids == (5, 6, 7, 8, 9)
    assert made.loss_mask == (False, False, True, True, True)
    assert made.logprobs == (0.0, 0.0, -1.0, -2.0, -3.0)
    assert made.versions == (VersionSpan(0, 2, 4), VersionSpan(1, 4, 5))
    assert made.num_sampled == 3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"token_ids": ()}, "token_ids must not be empty"),
        ({"logprobs": (0.0,)}, "5 token_ids but 1 logprobs"),
        ({"logprobs": (0.0, math.nan, -0.25, 0.0, -1.0)}, r"logprobs\[1\] must be finite"),
        ({"logprobs": (0.0, 0.0, math.inf, 0.0, -math.inf)}, r"logprobs\[2\] must be finite"),
        ({"loss_mask": (True, True, True, False, True)}, r"loss_mask\[0\] must be false"),
        ({"token_ids": (1, 2, -3, 4, 5)}, "token_ids must be >= 0"),
        ({"versions": (VersionSpan(3, 1, 3),)}, "sampled tokens from 3 on have no version span"),
        ({"versions": (VersionSpan(3, 1, 5),)}, r"version span \[1, 5\)"),
        ({"versions": (VersionSpan(3, 2, 3), VersionSpan(3, 4, 5))}, r"version span \[2, 3\)"),
        ({"versions": (VersionSpan(3, 1, 3), VersionSpan(3, 2, 3), VersionSpan(3, 4, 5))}, r"version span \[2, 3\)"),
        ({"versions": (VersionSpan(3, 1, 3), VersionSpan(3, 4, 10**12))}, r"version span \[4, 1000000000000\)"),
    ],
)
def test_a_faulty_sample_is_refused_by_field(fields: dict, message: str) -> None:
    assert sample().num_sampled == 3
    with pytest.raises(ValueError, match=message):
        sample(**fields)


def test_finite_logprobs_are_taken_though_their_sum_is_not() -> None:
    huge = (0.0, 0.0, -1.5e308, 0.0, -1.5e308)
    assert sample(logprobs=huge).logprobs == huge


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"reward": None}, "needs a reward"),
        ({"reward": math.inf}, "reward must be finite"),
        ({"samples": ()}, "needs at least one sample"),
        ({"status": RolloutStatus.ERROR}, "must have reward None"),
        ({"reward_parts": {"format": math.nan}}, "reward_parts"),
        ({"weight": -0.5}, "weight must be finite and >= 0, got -0.5"),
        ({"weight": math.inf}, "weight must be finite"),
    ],
)
def test_an_error_is_a_status_without_a_reward_and_never_a_zero(fields: dict, message: str) -> None:
    values = {"samples": (sample(),), "reward": 1.0, "status": RolloutStatus.COMPLETED}
    assert Rollout(**values).reward == 1.0
    with pytest.raises(ValueError, match=message):
        Rollout(**(values | fields))


@pytest.mark.parametrize("content", ["half a \ud83d", None, ["text"]])
def test_a_message_is_a_text_that_every_wire_and_file_takes(content: object) -> None:
    with pytest.raises(ValueError, match="content must be a text that can be written as UTF-8"):
        Message("user", content)  # type: ignore[arg-type]


def test_a_group_knows_its_oldest_and_newest_version() -> None:
    rollout = Rollout((sample(),), 1.0, RolloutStatus.COMPLETED)
    group = RolloutGroup("g", "arithmetic", 0, (rollout,))
    assert (group.oldest_policy_version, group.newest_policy_version) == (3, 4)
    failed = RolloutGroup("g", "arithmetic", 0, (Rollout((), None, RolloutStatus.ERROR),))
    assert (failed.oldest_policy_version, failed.newest_policy_version) == (None, None)


@pytest.mark.parametrize("fields", [{"max_tokens": 0}, {"temperature": math.nan}, {"top_p": 0.0}, {"top_k": -1}])
def test_sampling_parameters_out_of_range_are_refused(fields: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(fields))):
        SamplingParams(**({"max_tokens": 4} | fields))
