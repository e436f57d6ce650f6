"""What the queue looks like from outside, and in words why the learner or an environment waits."""

from dataclasses import asdict, dataclass

from syncline.trajectory.atropos_run import TRAINER, why_no_batch
from syncline.trajectory.queue import TrajectoryQueue
from syncline.trajectory.tickets import OUTSTANDING, TicketState


@dataclass(frozen=True, slots=True)
class EnvironmentStatus:
    weight: float
    num_granted: int
    num_permits: int
    num_queued: int
    num_to_retry: int
    """Task indices waiting to be handed out again."""
    num_done: int
    """Tasks trained on, or given up: neither out nor waiting. What a learner lost with its last steps is not."""
    num_tasks: int | None
    """Of a pass over its tasks; `None`: they have no end."""
    seconds_since_heard: float | None
    """`None`: not since this server process began."""


@dataclass(frozen=True, slots=True)
class QueueStatus:
    policy_version: int
    step: int
    capacity: int
    num_permits: int
    num_queued: int
    num_leased: int
    num_consumed: int
    counters: dict[str, int]
    environments: dict[str, EnvironmentStatus]
    why_waiting: str


def queue_status(queue: TrajectoryQueue) -> QueueStatus:
    ledger = queue.ledger
    return QueueStatus(
        policy_version=queue.state.policy_version,
        step=queue.state.step,
        capacity=queue.ledger.capacity,
        num_permits=ledger.count(TicketState.PERMITTED),
        num_queued=ledger.count(TicketState.QUEUED),
        num_leased=ledger.count(TicketState.LEASED),
        num_consumed=ledger.count(TicketState.CONSUMED),
        counters=asdict(queue.state.counters),
        environments={name: _environment(queue, name) for name in ledger.weights},
        why_waiting=why_no_batch(queue)
        if queue.state.learner == TRAINER
        else why_waiting(queue, queue.limits.groups_per_step),
    )


def why_waiting(queue: TrajectoryQueue, num_groups: int) -> str:
    """Why `num_groups` cannot be leased now, and who owes them; empty when they can."""
    if queue.state.policy_version < 0:
        return "no learner has started yet, so no environment may sample"
    num_ready = len(queue.ready())
    if num_ready >= num_groups:
        return ""
    debts = ", ".join(_debt(queue, name) for name in queue.ledger.weights)
    return f"{num_ready} of {num_groups} groups are queued for policy version {queue.state.policy_version}: {debts}"


def why_no_permit(queue: TrajectoryQueue) -> str:
    """Why an environment that asked got no permit."""
    if not queue.learner_heard:
        return "no learner has been heard since the server began"
    out = [f"{queue.ledger.count(state)} {state}" for state in (TicketState.QUEUED, TicketState.LEASED)]
    permits = queue.ledger.count(TicketState.PERMITTED)
    return f"capacity of {queue.ledger.capacity} groups is taken or promised: {permits} permits out, {', '.join(out)}"


def _environment(queue: TrajectoryQueue, name: str) -> EnvironmentStatus:
    line, heard = queue.state.lines[name], queue.last_heard.get(name)
    out = queue.ledger.count(*OUTSTANDING, environment=name)
    return EnvironmentStatus(
        weight=queue.ledger.weights[name],
        num_granted=line.granted,
        num_permits=queue.ledger.count(TicketState.PERMITTED, environment=name),
        num_queued=queue.ledger.count(TicketState.QUEUED, environment=name),
        num_to_retry=len(line.returned),
        num_done=line.next_index - len(line.returned) - out,
        num_tasks=line.num_tasks,
        seconds_since_heard=None if heard is None else queue.clock() - heard,
    )


def _debt(queue: TrajectoryQueue, name: str) -> str:
    environment = _environment(queue, name)
    heard = environment.seconds_since_heard
    when = "never heard of" if heard is None else f"last heard {heard:.1f} s ago"
    asking = ", waiting for permits" if any(ask.environment == name for ask in queue.asks.values()) else ""
    return f"{name!r} owes {environment.num_permits} ({when}{asking})"
