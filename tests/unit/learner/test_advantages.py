import math

import pytest

from syncline.learner.advantages import group_advantages, reward_metrics
from syncline.types import Rollout, RolloutGroup, RolloutStatus, TrainingSample, VersionSpan


def sample(num_sampled: int) -> TrainingSample:
    n = num_sampled
    return TrainingSample((7, *range(n)), (False,) + (True,) * n, (0.0,) + (-1.0,) * n, (VersionSpan(0, 1, n + 1),))


def rollout(reward: float | None, *lengths: int, status: RolloutStatus | None = None, **parts: float) -> Rollout:
    ended = status or (RolloutStatus.ERROR if reward is None else RolloutStatus.COMPLETED)
    return Rollout(tuple(sample(n) for n in lengths or (1,)), reward, ended, parts)


def group(name: str, *rewards: float | None) -> RolloutGroup:
    return RolloutGroup(name, "task", 0, tuple(rollout(reward) for reward in rewards))


def test_group_scale_worked_by_hand() -> None:
    # mean 2, unbiased variance ((-1)^2 + 0 + 1^2) / 2 = 1
    assert group_advantages([group("a", 1, 2, 3)], "group")["a"] == pytest.approx((-1 / 1.0001, 0, 1 / 1.0001))


def test_batch_scale_uses_the_groups_mean_and_the_batches_deviation() -> None:
    # rewards 0 2 4 6: mean 3, unbiased variance (9 + 1 + 1 + 9) / 3 = 20/3
    divisor = math.sqrt(20 / 3) + 1e-4
    advantages = group_advantages([group("a", 0, 2), group("b", 4, 6)], "batch")
    assert advantages["a"] == pytest.approx((-1 / divisor, 1 / divisor))
    assert advantages["b"] == advantages["a"]


def test_no_scale_only_centres() -> None:
    assert group_advantages([group("a", 0, 1, 5)], "none")["a"] == pytest.approx((-2, -1, 3))


def test_a_rollout_without_reward_moves_nobody() -> None:
    with_error = group_advantages([group("a", 1, None, 2, 3)], "group")["a"]
    assert with_error[1] == 0
    assert with_error[:1] + with_error[2:] == group_advantages([group("a", 1, 2, 3)], "group")["a"]


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_equal_lone_and_absent_rewards_give_exact_zeros(scale: str) -> None:
    groups = [group("equal", *[0.1] * 7), group("lone", 5.0, None), group("none", None, None)]
    advantages = group_advantages(groups, scale)  # type: ignore[arg-type]
    assert advantages == {"equal": (0.0,) * 7, "lone": (0.0, 0.0), "none": (0.0, 0.0)}


def test_the_same_group_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="'a' is in the batch twice"):
        group_advantages([group("a", 1, 2), group("a", 1, 2)], "group")


def test_metrics_worked_by_hand() -> None:
    first = (
        rollout(1.0, 2, 3, accuracy=1.0, form=0.5),
        rollout(0.0, 1, accuracy=0.0),
        rollout(None),
        rollout(None, status=RolloutStatus.ABORTED),
    )
    second = (rollout(1.0, 6, status=RolloutStatus.TRUNCATED), rollout(1.0, 4))
    groups = [RolloutGroup("a", "task", 0, first), RolloutGroup("b", "task", 1, second), group("c", None, None)]
    assert reward_metrics(groups) == pytest.approx(
        {
            "rollouts/error_ratio": 3 / 8,
            "rollouts/aborted_ratio": 1 / 8,
            "reward": 3 / 4,
            "reward_std": (math.sqrt(0.5) + 0) / 2,
            "frac_reward_zero_std": 1 / 2,
            "completions/mean_length": (5 + 1 + 6 + 4) / 4,
            "completions/min_length": 1,
            "completions/max_length": 6,
            "completions/clipped_ratio": 1 / 4,
            "completions/mean_terminated_length": (5 + 1 + 4) / 3,
            "completions/min_terminated_length": 1,
            "completions/max_terminated_length": 5,
            "rewards/accuracy/mean": 1 / 2,
            "rewards/accuracy/std": math.sqrt(0.5),
            "rewards/form/mean": 1 / 2,
            "rewards/form/std": 0,
        }
    )


def test_a_batch_of_errors_has_no_reward_rather_than_zero() -> None:
    assert reward_metrics([group("a", None, None)]) == {"rollouts/error_ratio": 1.0, "rollouts/aborted_ratio": 0.0}
