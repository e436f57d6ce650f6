"""Rewards to advantages, relative to the siblings of a group (GRPO, arXiv 2402.03300 §4.1.2), and the reward metrics.

Plain floats: a batch holds a few hundred rewards. A rollout without a reward (error, aborted) takes no part in any mean
or deviation; its advantage is 0 and `packing` leaves it out of the loss.
"""

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean, stdev
from typing import Literal

from syncline.types import Rollout, RolloutGroup, RolloutStatus

STD_EPSILON = 1e-4


def group_advantages(
    groups: Sequence[RolloutGroup], scale: Literal["group", "batch", "none"]
) -> dict[str, tuple[float, ...]]:
    """Advantages by group id, one a rollout.

    `(r - mean of the group) / (std + 1e-4)`, the unbiased std (n - 1, as TRL's) of the group's rewards or of the whole
    batch's; `"none"` does not divide (Dr. GRPO, arXiv 2503.20783). A group whose rewards are all equal gets exact
    zeros.
    """
    batch_std = _std([r for group in groups for r in _rewards(group.rollouts)])
    advantages = {}
    for group in groups:
        if group.group_id in advantages:
            raise ValueError(f"group_id {group.group_id!r} is in the batch twice")
        rewards = _rewards(group.rollouts)
        divisor = {"group": _std(rewards) + STD_EPSILON, "batch": batch_std + STD_EPSILON, "none": 1.0}[scale]
        mean = 0.0 if not rewards else rewards[0] if _all_equal(rewards) else fmean(rewards)
        advantages[group.group_id] = tuple(
            0.0 if rollout.reward is None else (rollout.reward - mean) / divisor for rollout in group.rollouts
        )
    return advantages


def reward_metrics(groups: Sequence[RolloutGroup]) -> dict[str, float]:
    """What the batch earned, under TRL's keys. Lengths are sampled tokens of a rollout, all its samples together.

    Means run over the rollouts with a reward; a key that nothing in the batch supports is absent, never NaN.
    """
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    metrics = {
        "rollouts/error_ratio": _share(r.status is RolloutStatus.ERROR for r in rollouts),
        "rollouts/aborted_ratio": _share(r.status is RolloutStatus.ABORTED for r in rollouts),
    }
    scored = [rollout for rollout in rollouts if rollout.reward is not None]
    if not scored:
        return metrics
    rewards_by_group = [rewards for group in groups if (rewards := _rewards(group.rollouts))]
    lengths = [num_sampled(rollout) for rollout in scored]
    return metrics | {
        "reward": fmean(_rewards(scored)),
        "reward_std": fmean(_std(rewards) for rewards in rewards_by_group),
        "frac_reward_zero_std": _share(_all_equal(rewards) for rewards in rewards_by_group),
        "completions/mean_length": fmean(lengths),
        "completions/min_length": float(min(lengths)),
        "completions/max_length": float(max(lengths)),
        "completions/clipped_ratio": _share(r.status is RolloutStatus.TRUNCATED for r in scored),
        **_terminated_lengths(scored),
        **{f"rewards/{part}/mean": fmean(values) for part, values in _parts(scored).items()},
        **{f"rewards/{part}/std": _std(values) for part, values in _parts(scored).items()},
    }


def _terminated_lengths(scored: Iterable[Rollout]) -> dict[str, float]:
    """Of completions that ended by themselves; empty when none did."""
    lengths = [num_sampled(rollout) for rollout in scored if rollout.status is RolloutStatus.COMPLETED]
    if not lengths:
        return {}
    stats = {"mean": fmean(lengths), "min": float(min(lengths)), "max": float(max(lengths))}
    return {f"completions/{stat}_terminated_length": value for stat, value in stats.items()}


def num_sampled(rollout: Rollout) -> int:
    """Sampled tokens of a rollout, all its samples together."""
    return sum(sample.num_sampled for sample in rollout.samples)


def _rewards(rollouts: Iterable[Rollout]) -> list[float]:
    return [rollout.reward for rollout in rollouts if rollout.reward is not None]


def _std(rewards: list[float]) -> float:
    return 0.0 if len(rewards) < 2 or _all_equal(rewards) else stdev(rewards)


def _all_equal(rewards: list[float]) -> bool:
    return min(rewards) == max(rewards)


def _share(marks: Iterable[bool]) -> float:
    return fmean(map(float, marks))


def _parts(scored: Iterable[Rollout]) -> Mapping[str, list[float]]:
    """Values of each reward part, over the rollouts that report it."""
    parts: dict[str, list[float]] = {}
    for rollout in scored:
        for name, value in rollout.reward_parts.items():
            parts.setdefault(name, []).append(value)
    return parts
