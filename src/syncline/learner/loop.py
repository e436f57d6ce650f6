"""THE loop. Bridges, losses, optimizers, sources, one GPU or many: objects handed in, never copies of this.

Who waits for whom: `next_batch` waits for the environments (through the trajectory server); `publish` waits for the
engine. Environments sample again as soon as `acknowledge` frees their permits, under the version just published.
"""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

from syncline.config import RunConfig
from syncline.errors import CheckpointError
from syncline.learner.advantages import group_advantages, reward_metrics
from syncline.learner.checkpoint import Checkpoints, TrainState
from syncline.learner.model import vocabulary_size
from syncline.learner.optim import SplitMasterAdamW
from syncline.learner.parity import ParityGate
from syncline.learner.step import Step
from syncline.learner.stopping import Stopped, StopRequest
from syncline.learner.telemetry import log_step, staleness, timings
from syncline.learner.versions import refuse_unknown_tokens, refuse_unproved
from syncline.observe.metrics import Metrics
from syncline.protocols import MetricSink, RolloutSource, SyncReport, WeightBridge

log = logging.getLogger("syncline.train")


@dataclass(frozen=True, slots=True)
class Parts:
    """Everything the loop is given."""

    model: nn.Module
    optimizer: SplitMasterAdamW
    step: Step
    bridge: WeightBridge
    source: RolloutSource
    sink: MetricSink
    checkpoints: Checkpoints
    gate: ParityGate
    device: torch.device
    stop: StopRequest = field(default_factory=StopRequest)
    """Whoever listens for signals says here that somebody asked to stop."""
    newest_served: int = -1
    """The newest version that an engine has sampled from: of this run's earlier life, or of another run."""


def train(config: RunConfig, parts: Parts) -> TrainState:
    """Trains until `run.num_steps`, from the newest checkpoint if there is one. Returns the final state."""
    model, optimizer = parts.model, parts.optimizer
    resumed, digest = resume(parts)
    state = resumed.beyond(parts.newest_served)
    if state != resumed:
        told = "an engine has served version %d already, and the weights resumed are those of %d: going on as %d"
        log.warning(told, parts.newest_served, resumed.policy_version, state.policy_version)
    synced = parts.bridge.publish(model, policy_version=state.policy_version)
    if digest not in (None, synced.receipt.digest):
        raise CheckpointError(
            f"the weights of step {state.step} have digest {synced.receipt.digest[:12]}, not the saved {digest[:12]}"
        )
    parts.gate.check(model, device=parts.device)
    parts.source.start(policy_version=state.policy_version, step=state.step, resumed_version=resumed.policy_version)
    lost = range(resumed.policy_version + 1, state.policy_version)
    while state.step < config.run.num_steps:
        report, started = Metrics(), time.perf_counter()
        with _saved_when_stopped(config, parts, state, synced.receipt.digest):
            groups = parts.source.next_batch(config.run.groups_per_step)
        refuse_unproved(groups, proved=state.policy_version, lost=lost)
        refuse_unknown_tokens(groups, vocabulary_size=vocabulary_size(model))
        sampled = time.perf_counter()
        report.update(staleness(groups, policy_version=state.policy_version))
        advantages = group_advantages(groups, config.learner.loss.scale_advantages)
        num_tokens = parts.step.backward(model, groups, advantages, report, optimizer=optimizer, step=state.step)
        with parts.bridge.updating():
            parts.step.apply_gradients(optimizer, state.step, report)
            learned = time.perf_counter()
            state = state.next(trained_tokens=num_tokens, publishes=publishes_after(state.step + 1, config))
            if state.policy_version > synced.receipt.policy_version:
                synced = parts.bridge.publish(model, policy_version=state.policy_version)
            else:
                synced = SyncReport(synced.receipt, 0, 0.0, 0.0)
        parts.source.acknowledge(groups, step=state.step, policy_version=state.policy_version)
        report.update(reward_metrics(groups))
        report.update(parts.source.metrics())
        report.update(timings(started, sampled, learned, synced=synced, num_tokens=num_tokens))
        if config.parity.interval and state.step % config.parity.interval == 0:
            report.update(parts.gate.check(model, device=parts.device).metrics())
        log_step(parts.sink, state, report, groups=groups, advantages=advantages)
        if state.step % config.learner.checkpoint_interval == 0 or state.step == config.run.num_steps:
            _save(parts, state, synced.receipt.digest)
    return state


@contextmanager
def _saved_when_stopped(config: RunConfig, parts: Parts, state: TrainState, digest: str) -> Iterator[None]:
    """The last step, if it was published: a checkpoint tells the digest that an engine will be asked for."""
    try:
        with parts.stop.here():
            yield
    except Stopped:
        if publishes_after(state.step, config) and state.step > parts.checkpoints.newest_step():
            _save(parts, state, digest)
        raise


def _save(parts: Parts, state: TrainState, digest: str) -> None:
    parts.checkpoints.save(state, parts.model, parts.optimizer, digest=digest)
    parts.source.commit(step=state.step)


def publishes_after(step: int, config: RunConfig) -> bool:
    return step % config.bridge.interval == 0 or step == config.run.num_steps


def resume(parts: Parts) -> tuple[TrainState, str | None]:
    """The newest checkpoint's state, restored in place, and the digest of its weights; step 0 when there is none."""
    newest = parts.checkpoints.newest()
    if newest is None:
        return TrainState(), None
    return parts.checkpoints.load(newest, parts.model, parts.optimizer)
