from syncline.learner.telemetry import staleness
from syncline.types import Rollout, RolloutGroup, RolloutStatus, TrainingSample, VersionSpan


def rollout(*spans: VersionSpan) -> Rollout:
    n = spans[-1].end
    sample = TrainingSample((7,) * n, (False,) + (True,) * (n - 1), (0.0,) + (-1.0,) * (n - 1), spans)
    return Rollout((sample,), 1.0, RolloutStatus.COMPLETED)


def test_staleness_counts_every_token_under_its_own_version() -> None:
    # Trained as version 5: three tokens are 2 behind, one is 1 behind, four are on-policy.
    groups = [
        RolloutGroup("a", "task", 0, (rollout(VersionSpan(3, 1, 4), VersionSpan(4, 4, 5)),)),
        RolloutGroup("b", "task", 1, (rollout(VersionSpan(5, 1, 5)),)),
    ]
    expected = {"sample/staleness_mean": (3 * 2 + 1) / 8, "sample/staleness_max": 2.0}
    assert staleness(groups, policy_version=5) == expected


def test_a_batch_in_which_nothing_was_sampled_has_no_age() -> None:
    failed = Rollout((), None, RolloutStatus.ERROR, error="made to fail")
    assert staleness([RolloutGroup("a", "task", 0, (failed,))], policy_version=5) == {}
