"""What the loop tells of a step beside the learning itself: where the time went, and rollouts for people to read."""

import time
from collections.abc import Mapping, Sequence

from syncline.learner.checkpoint import TrainState
from syncline.observe.metrics import Metrics
from syncline.protocols import MetricSink, SyncReport
from syncline.types import RolloutGroup


def timings(started: float, sampled: float, learned: float, *, synced: SyncReport, num_tokens: int) -> dict[str, float]:
    """Where a step's time went. `started`, `sampled` and `learned` are `perf_counter` readings."""
    changed = {} if synced.changed_fraction is None else {"sync/changed_fraction": synced.changed_fraction}
    engines = {} if synced.num_engines is None else {"sync/engines": float(synced.num_engines)}
    step_seconds = time.perf_counter() - started
    return {
        "time/step_seconds": step_seconds,
        "time/wait_seconds": sampled - started,
        "time/learn_seconds": learned - sampled,
        "time/sync_seconds": synced.seconds,
        "sync/pause_seconds": synced.pause_seconds,
        "sync/bytes": float(synced.num_bytes),
        **changed,
        **engines,
        "tokens/trained_per_second": num_tokens / (learned - sampled),
        **{f"sync/{part}_seconds": seconds for part, seconds in synced.parts_seconds.items() if part != "pause"},
    }


def staleness(groups: Sequence[RolloutGroup], *, policy_version: int) -> dict[str, float]:
    """How many versions behind `policy_version`, the one trained, the sampled tokens are: 0 is on-policy. TRL's keys,
    but the mean is over tokens, because the versions of one rollout may differ. Nothing sampled gives an empty dict.
    """
    spans = [span for group in groups for rollout in group.rollouts for s in rollout.samples for span in s.versions]
    if not spans:
        return {}
    ages = [(policy_version - span.policy_version, span.end - span.start) for span in spans]
    num_tokens = sum(tokens for _, tokens in ages)
    return {
        "sample/staleness_mean": sum(age * tokens for age, tokens in ages) / num_tokens,
        "sample/staleness_max": float(max(age for age, _ in ages)),
    }


def log_step(
    sink: MetricSink,
    state: TrainState,
    report: Metrics,
    *,
    groups: Sequence[RolloutGroup],
    advantages: Mapping[str, Sequence[float]],
) -> None:
    report.add("policy_version", state.policy_version)
    report.add("num_tokens", state.trained_tokens)  # TRL's key for a count that goes on growing
    report.add("tokens/sampled", sum(s.num_sampled for g in groups for r in g.rollouts for s in r.samples))
    sink.log(state.step, report.reduced())
    sink.log_rollouts(state.step, groups, advantages)
