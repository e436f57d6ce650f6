"""The loop on fakes: what it does in which order, and a resume that is equal to the bit."""

import itertools
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from real_engine import make_tiny_model, run_values

from syncline.bridges.receipt import model_digest, parameter_digests
from syncline.config import RunConfig, resolve
from syncline.config.schema import Lora, Parity
from syncline.errors import SyncError, TrainingError
from syncline.learner.checkpoint import Checkpoints
from syncline.learner.loop import Parts, train
from syncline.learner.model import Scorer, load_model, trainable_parameters
from syncline.learner.optim import SplitMasterAdamW
from syncline.learner.parity import ParityGate
from syncline.learner.step import Step
from syncline.learner.stopping import Stopped
from syncline.learner.versions import refuse_unproved
from syncline.protocols import Receipt, SyncReport
from syncline.testing import FakeGenerate, InMemoryTrajectories, ListMetricSink, make_group
from syncline.trajectory.ledger import QueueLimits
from syncline.trajectory.queue import TrajectoryQueue
from syncline.trajectory.shares import Ask
from syncline.types import Completion, FinishReason, Rollout, RolloutGroup, RolloutStatus, TrainingSample, VersionSpan

CPU = torch.device("cpu")
GROUPS_PER_STEP = 2


@dataclass
class RecordingBridge:
    """A `WeightBridge` to nowhere that writes down what it was asked."""

    events: list[str]
    versions: list[int] = field(default_factory=list)

    def attach(self, model: Any) -> None: ...

    @contextmanager
    def updating(self):
        self.events.append("updating")
        yield
        self.events.append("updated")

    def publish(self, model: Any, *, policy_version: int) -> SyncReport:
        self.events.append("publish")
        self.versions.append(policy_version)
        digest = model_digest(parameter_digests(model.named_parameters()))
        return SyncReport(Receipt(policy_version, digest), 0, 0.0, 0.0)

    def close(self) -> None: ...


class RecordingTrajectories(InMemoryTrajectories):
    def __init__(self, events: list[str]) -> None:
        super().__init__()
        self.events = events

    def acknowledge(self, groups: Any, *, step: int, policy_version: int) -> None:
        super().acknowledge(groups, step=step, policy_version=policy_version)
        self.events.append("acknowledge")

    def commit(self, *, step: int) -> None:
        super().commit(step=step)
        self.events.append("commit")


ANSWER = Completion((20, 21), (-3.0, -3.0), (VersionSpan(0, 0, 2),), FinishReason.STOP)
GATE = ParityGate(
    config=Parity(max_mean_abs_diff=1e9, max_k3_kl=1e9),
    connect=lambda: nullcontext(FakeGenerate(lambda *_: ANSWER)),
    encode=lambda _: (5, 6, 7),
    temperature=1.0,
    scorer=Scorer(1.0, 64),
    token_budget=64,
)
"""Scores as a run's does, and lets all pass."""


def group(index: int, *, policy_version: int = 0) -> RolloutGroup:
    """Rollouts that answer a made-up prompt; longer answers earn more."""
    rollouts = []
    for i in range(4):
        answer = tuple(20 + (index + i + j) % 20 for j in range(i + 2))
        completion = Completion(
            answer, (-3.0,) * len(answer), (VersionSpan(policy_version, 0, len(answer)),), FinishReason.STOP
        )
        sample = TrainingSample.from_completion((5, 6 + index % 9, 7), completion)
        rollouts.append(Rollout((sample,), float(i % 3), RolloutStatus.COMPLETED))
    return RolloutGroup(f"group-{index}", "made-up", index, tuple(rollouts))


@pytest.fixture(scope="module")
def model_path(tmp_path_factory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"))


def config_of(
    model_path: Path, folder: Path, *, num_steps: int, max_staleness: int = 0, lora: Lora | None = None
) -> RunConfig:
    values = run_values(model_path, folder)
    values["model"]["lora"] = lora and lora.model_dump()
    values["run"] |= {"num_steps": num_steps, "groups_per_step": GROUPS_PER_STEP, "max_staleness": max_staleness}
    values["learner"] = {
        "token_budget": 128,
        "checkpoint_interval": 3,
        "optimizer": {"learning_rate": 1e-3, "schedule": "constant"},
    }
    values["parity"] = {"interval": 0}
    return resolve(values)


def parts_of(config: RunConfig, *, first_group: int, events: list[str]) -> Parts:
    torch.manual_seed(0)
    model = load_model(config.model, device=CPU)
    source = RecordingTrajectories(events)
    for index in range(first_group, GROUPS_PER_STEP * config.run.num_steps):
        source._held.append(_held(group(index)))
    return Parts(
        model=model,
        optimizer=SplitMasterAdamW(trainable_parameters(model), config.learner.optimizer),
        step=Step(
            config=config.learner,
            scorer=Scorer(1.0, 64),
            reference=None,
            device=CPU,
            max_completion_tokens=16,
            num_steps=config.run.num_steps,
        ),
        bridge=RecordingBridge(events),
        source=source,
        sink=ListMetricSink(),
        checkpoints=Checkpoints(Path(config.run.dir) / "checkpoints", 2, Path(config.model.path)),
        gate=GATE,
        device=CPU,
    )


def _held(made: RolloutGroup) -> Any:
    from syncline.testing import _Held

    return _Held(made, f"permit-{made.task_index}")


def test_a_step_publishes_before_it_acknowledges_and_saves_before_it_commits(model_path: Path, tmp_path: Path) -> None:
    config = config_of(model_path, tmp_path, num_steps=3)
    events: list[str] = []
    parts = parts_of(config, first_group=0, events=events)
    state = train(config, parts)
    step = ["updating", "publish", "updated", "acknowledge"]
    assert events == ["publish", "commit", *step, *step, *step, "commit"]
    assert parts.bridge.versions == [0, 1, 2, 3]  # type: ignore[attr-defined]
    assert (state.step, state.policy_version) == (3, 3)
    assert parts.checkpoints.newest_step() == 3
    assert [s for s, _ in parts.sink.logged] == [1, 2, 3]  # type: ignore[attr-defined]


def test_versions_are_published_at_their_interval_and_after_the_last_step(model_path: Path, tmp_path: Path) -> None:
    config = config_of(model_path, tmp_path, num_steps=5)
    config = config.model_copy(update={"bridge": config.bridge.model_copy(update={"interval": 3})})
    events: list[str] = []
    parts = parts_of(config, first_group=0, events=events)
    state = train(config, parts)
    assert (state.step, state.policy_version) == (5, 2)
    assert parts.bridge.versions == [0, 1, 2]  # type: ignore[attr-defined]
    metrics = [metrics for _, metrics in parts.sink.logged]  # type: ignore[attr-defined]
    assert [int(one["policy_version"]) for one in metrics] == [0, 0, 1, 1, 2]
    held = {path.name: Checkpoints.load(parts.checkpoints, path, parts.model, parts.optimizer)[0] for path in
            sorted(parts.checkpoints.folder.iterdir())}  # fmt: skip
    assert {name: state.policy_version for name, state in held.items()} == {"step-000003": 1, "step-000005": 2}


@pytest.mark.parametrize("lora", [None, Lora(rank=4, dropout=0.3)], ids=["full", "an adapter with dropout"])
def test_a_resumed_run_takes_the_very_same_steps(model_path: Path, tmp_path: Path, lora: Lora | None) -> None:
    whole = config_of(model_path, tmp_path / "whole", num_steps=6, lora=lora)
    uninterrupted = parts_of(whole, first_group=0, events=[])
    train(whole, uninterrupted)

    half = config_of(model_path, tmp_path / "halves", num_steps=3, lora=lora)
    train(half, parts_of(half, first_group=0, events=[]))
    rest = config_of(model_path, tmp_path / "halves", num_steps=6, lora=lora)
    resumed = parts_of(rest, first_group=3 * GROUPS_PER_STEP, events=[])
    train(rest, resumed)

    expected = dict(uninterrupted.model.named_parameters())
    assert all(torch.equal(expected[name], p) for name, p in resumed.model.named_parameters())
    losses = {step: metrics["loss"] for step, metrics in uninterrupted.sink.logged}  # type: ignore[attr-defined]
    assert {step: metrics["loss"] for step, metrics in resumed.sink.logged} == {  # type: ignore[attr-defined]
        step: losses[step] for step in (4, 5, 6)
    }


def test_steps_in_the_backward_pass_are_those_after_it(model_path: Path, tmp_path: Path) -> None:
    trained = []
    for in_backward in (False, True):
        folder = tmp_path / str(in_backward)
        config = config_of(model_path, folder, num_steps=2)
        optimizer = config.learner.optimizer.model_copy(update={"in_backward": in_backward, "max_grad_norm": None})
        learner = config.learner.model_copy(update={"optimizer": optimizer})
        parts = parts_of(config.model_copy(update={"learner": learner}), first_group=0, events=[])
        train(config, parts)
        trained.append(parts)
    after, within = trained
    assert all(torch.equal(a, b) for a, b in zip(after.model.parameters(), within.model.parameters(), strict=True))
    norms = [[metrics["grad_norm"] for _, metrics in parts.sink.logged] for parts in trained]  # type: ignore[attr-defined]
    assert norms[0] == pytest.approx(norms[1])


def test_a_step_without_anything_to_learn_from_moves_nothing(model_path: Path, tmp_path: Path) -> None:
    config = config_of(model_path, tmp_path, num_steps=1)
    parts = parts_of(config, first_group=GROUPS_PER_STEP, events=[])
    failed = Rollout((), None, RolloutStatus.ERROR, error="made to fail")
    for i in range(GROUPS_PER_STEP):
        parts.source._held.append(_held(RolloutGroup(f"failed-{i}", "made-up", i, (failed,))))  # type: ignore[attr-defined]
    before = [p.detach().clone() for p in parts.model.parameters()]
    train(config, parts)
    assert all(torch.equal(a, b) for a, b in zip(before, parts.model.parameters(), strict=True))
    [(_, metrics)] = parts.sink.logged  # type: ignore[attr-defined]
    assert metrics["step/skipped"] == 1


class CarelessSource(RecordingTrajectories):
    """It hands out what it has, whatever is served."""

    def next_batch(self, num_groups: int) -> list[RolloutGroup]:
        return [make_group("made-up", i, policy_version=i) for i in range(num_groups)]


def test_a_group_of_a_version_that_was_never_published_stops_the_run_before_the_loss(
    model_path: Path, tmp_path: Path
) -> None:
    config = config_of(model_path, tmp_path, num_steps=2)
    events: list[str] = []
    parts = replace(parts_of(config, first_group=0, events=events), source=CarelessSource(events))
    before = [p.detach().clone() for p in parts.model.parameters()]
    with pytest.raises(SyncError, match=r"'made-up-1' of made-up holds tokens of policy version 1, .* alike is 0;"):
        train(config, parts)
    assert events == ["publish", "commit"], "no step was taken, and nothing was acknowledged"
    assert all(torch.equal(a, b) for a, b in zip(before, parts.model.parameters(), strict=True))


def test_a_run_resumed_on_engines_that_outlived_it_goes_on_above_what_they_served(
    model_path: Path, tmp_path: Path
) -> None:
    train(config_of(model_path, tmp_path, num_steps=3), parts_of(
        config_of(model_path, tmp_path, num_steps=3), first_group=0, events=[]))  # fmt: skip
    rest = config_of(model_path, tmp_path, num_steps=4, max_staleness=9)
    parts = replace(parts_of(rest, first_group=6, events=[]), newest_served=7)
    parts.source._held.insert(0, _held(group(0, policy_version=5)))  # type: ignore[attr-defined]
    state = train(rest, parts)
    assert parts.bridge.versions == [8, 9]  # type: ignore[attr-defined]
    assert (state.step, state.policy_version) == (4, 9)
    assert [index for held in parts.source._returned.values() for index in held] == [0], "of a life that is lost"  # type: ignore[attr-defined]


def test_tokens_of_a_lost_life_are_refused_at_the_last_door() -> None:
    kept, lost = (make_group("e", i, policy_version=version) for i, version in enumerate((3, 5)))
    refuse_unproved([kept], proved=9, lost=range(4, 8))
    with pytest.raises(SyncError, match=r"policy version 5, which an earlier life .* goes on from 3, never held"):
        refuse_unproved([kept, lost], proved=9, lost=range(4, 8))


def test_groups_of_earlier_versions_and_groups_without_tokens_are_proved() -> None:
    refuse_unproved([make_group("e", 0, policy_version=3), make_group("e", 1, rewards=(None, None))], proved=3)


class QueueAndEnvironment:
    """`RolloutSource` over the real queue, with an environment that samples what a step lacks, and more when told."""

    def __init__(self, config: RunConfig) -> None:
        limits = QueueLimits(GROUPS_PER_STEP, 4, config.run.max_staleness, lease_seconds=100.0)
        ids = itertools.count()
        self.queue = TrajectoryQueue(limits, {"made-up": 1.0}, clock=lambda: 0.0, new_id=lambda: f"p{next(ids)}")
        self.served = 0
        """What the engine samples from."""
        self.groups: dict[str, RolloutGroup] = {}

    def sample(self, num_groups: int = 100) -> int:
        """As many groups as there are permits for, of those wanted."""
        ask = Ask("made-up", "0", num_groups)
        self.queue.ask(ask, held=set(self.queue.ledger.live))
        granted = self.queue.grant(ask)
        self.queue.withdraw(ask)
        for ticket in granted:
            made = group(ticket.task_index, policy_version=self.served)
            self.groups[made.group_id] = made
            self.queue.put(made, ticket.permit_id)
        return len(granted)

    def start(self, *, policy_version: int, step: int, resumed_version: int | None) -> None:
        self.queue.start(learner="L", policy_version=policy_version, step=step, resumed_version=resumed_version)

    def next_batch(self, num_groups: int) -> list[RolloutGroup]:
        if lacking := num_groups - len(self.queue.ready()):
            self.sample(lacking)
        leased = self.queue.lease(num_groups, learner="L", lease_id=f"{self.queue.state.step}")
        return [self.groups[ticket.group_id or ""] for ticket in leased]

    def acknowledge(self, groups: Any, *, step: int, policy_version: int) -> None:
        ids = [group.group_id for group in groups]
        self.queue.acknowledge(ids, learner="L", step=step, policy_version=policy_version)

    def commit(self, *, step: int) -> None:
        self.queue.commit(learner="L", step=step)

    def metrics(self) -> dict[str, float]:
        return {"queue/stale": self.queue.state.counters.stale}


@dataclass
class AsynchronousBridge(RecordingBridge):
    """Lets the environment sample before every update: all that time the learner was at work."""

    source: QueueAndEnvironment | None = None
    sampled_while_learning: list[int] = field(default_factory=list)

    @contextmanager
    def updating(self):
        assert self.source is not None
        self.sampled_while_learning.append(self.source.sample())
        yield

    def publish(self, model: Any, *, policy_version: int) -> SyncReport:
        assert self.source is not None
        self.source.served = policy_version
        return super().publish(model, policy_version=policy_version)


def test_a_token_that_the_model_does_not_know_stops_the_run_before_the_loss(model_path: Path, tmp_path: Path) -> None:
    """As the last one of its sequence it is only predicted, and no embedding would have noticed."""
    config = config_of(model_path, tmp_path, num_steps=1)
    parts = parts_of(config, first_group=GROUPS_PER_STEP, events=[])
    completion = Completion((20, 70), (-3.0, -3.0), (VersionSpan(0, 0, 2),), FinishReason.STOP)
    rollout = Rollout((TrainingSample.from_completion((5, 6), completion),), 1.0, RolloutStatus.COMPLETED)
    parts.source._held += [  # type: ignore[attr-defined]
        _held(replace(group(index), rollouts=(rollout, *group(index).rollouts))) for index in range(GROUPS_PER_STEP)
    ]
    before = [parameter.detach().clone() for parameter in parts.model.parameters()]
    with pytest.raises(TrainingError, match=r"group 'group-0' of made-up holds token 70, .* below 70"):
        train(config, parts)
    assert all(torch.equal(a, b) for a, b in zip(before, parts.model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("max_staleness", "sampled_while_learning", "ages"),
    [(0, [0, 0, 0, 0], [0, 0, 0, 0]), (1, [2, 2, 2, 2], [0, 1, 1, 1]), (2, [4, 2, 2, 2], [0, 1, 2, 2])],
)
def test_environments_sample_while_the_learner_learns_as_far_as_the_run_allows(
    model_path: Path, tmp_path: Path, max_staleness: int, sampled_while_learning: list[int], ages: list[int]
) -> None:
    config = config_of(model_path, tmp_path, num_steps=4, max_staleness=max_staleness)
    source = QueueAndEnvironment(config)
    bridge = AsynchronousBridge([], source=source)
    parts = replace(parts_of(config, first_group=0, events=[]), source=source, bridge=bridge)
    train(config, parts)
    logged = [metrics for _, metrics in parts.sink.logged]  # type: ignore[attr-defined]
    assert bridge.sampled_while_learning == sampled_while_learning
    assert [metrics["sample/staleness_mean"] for metrics in logged] == ages
    assert [metrics["sample/staleness_max"] for metrics in logged] == ages
    assert logged[-1]["queue/stale"] == 0


class StoppedAfter(RecordingTrajectories):
    """Somebody presses Ctrl-C while the learner waits for the batch after `num_batches`."""

    def __init__(self, events: list[str], held: Any, num_batches: int) -> None:
        super().__init__(events)
        self._held, self._left = held, num_batches

    def next_batch(self, num_groups: int) -> list[RolloutGroup]:
        if self._left == 0:
            raise Stopped(2)
        self._left -= 1
        return super().next_batch(num_groups)


@pytest.mark.parametrize(("num_batches", "saved"), [(2, 2), (0, 0)])
def test_a_learner_that_is_stopped_saves_its_last_step(
    model_path: Path, tmp_path: Path, num_batches: int, saved: int
) -> None:
    config = config_of(model_path, tmp_path, num_steps=3)
    events: list[str] = []
    parts = parts_of(config, first_group=0, events=events)
    source = StoppedAfter(events, parts.source._held, num_batches)  # type: ignore[attr-defined]
    with pytest.raises(Stopped):
        train(config, replace(parts, source=source))
    assert parts.checkpoints.newest_step() == saved
    assert not saved or events[-1] == "commit"
