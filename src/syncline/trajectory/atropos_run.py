"""The Atropos wire's rules over the queue: who may register, what a batch is, what its status answers say.

An upload is an ask for one permit with its group in hand, so environments of this wire and of ours take turns by their
weights and feel the same back-pressure. A trainer of this wire is a learner that never acknowledges: a batch it was
sent whole counts as one step, and stays on disk for some steps more, for a trainer that registers again from an
earlier one. Where the run's own learner trains, `own` says for it what a trainer would have registered.
"""

import math
import uuid
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from syncline.trajectory.atropos_wire import MIN_WEIGHT, AtroposState, RegisteredEnv, RegisterEnv, Registration
from syncline.trajectory.batches import Candidate, choose, sequences_promised
from syncline.trajectory.queue import Refused, TrajectoryQueue
from syncline.trajectory.tickets import HOLDS_GROUP, LIVE, Counters, Ticket, TicketState
from syncline.trajectory.wire import StartRequest

TRAINER = "atropos trainer"
"""The learner's name while a trainer of this wire consumes; it may be many processes."""
ANONYMOUS = "atropos"
"""Line of the uploads that carry no `env_id`."""
BATCHES_AHEAD = 8
"""Batches that may be queued for a trainer: above what environments ask of themselves (`max_batches_offpolicy`)."""
BATCHES_KEPT = 64
"""Most batches kept after they were sent."""
PATIENCE_SECONDS = 120.0
"""An environment that was silent for longer keeps no share, and no promised part of a batch waits for it."""
MAX_ENVIRONMENTS = 1024


class Unknown(Refused):
    """No such environment."""


class Busy(Refused):
    """Not now; the sender may come again."""


def registration(queue: TrajectoryQueue, own: Registration | None) -> Registration | None:
    """What holds for this run now; `None` before there is a trainer or learner."""
    if queue.state.learner == TRAINER:
        return queue.state.atropos.registration
    terms = queue.state.terms
    return (own or (terms and terms.registration)) if queue.state.policy_version >= 0 else None


def begin(queue: TrajectoryQueue, asked: StartRequest) -> None:
    """A learner of ours starts. Where it says of what run, nothing of another one is left, nor, at step 0, of an
    earlier life: what that trained on is lost with it."""
    state = queue.state
    if asked.terms is not None and queue.limits.admits_runs:
        if asked.step == 0 or state.terms is None or state.terms.run_id != asked.terms.run_id:
            _forget(queue, HOLDS_GROUP)
        state.terms = asked.terms
    queue.start(
        learner=asked.learner,
        policy_version=asked.policy_version,
        step=asked.step,
        resumed_version=asked.resumed_version,
    )


def register(queue: TrajectoryQueue, asked: Registration) -> None:
    """A trainer starts, or starts again: what it says now holds, batches not wholly sent are handed out again, and so
    are those of steps after its `starting_step`. Raises `Refused` while another kind of learner has the run."""
    state = queue.state
    if state.learner not in ("", TRAINER):
        raise Refused(
            f"this run's learner is {state.learner!r}, not a trainer of the Atropos wire; pull over POST /lease, or, "
            "on a server that was started for no run, begin another under http://host:port/runs/NAME"
        )
    state.atropos.registration = asked
    version = max(state.policy_version, 0)
    queue.start(learner=TRAINER, policy_version=version, step=asked.starting_step, capacity=_capacity(state.atropos))


def register_env(queue: TrajectoryQueue, asked: RegisterEnv, own: Registration | None) -> dict[str, Any]:
    """Raises `Refused` for a group that no batch can hold."""
    atropos, run = queue.state.atropos, registration(queue, own)
    started = atropos.started or queue.state.learner != TRAINER
    if run is None or not started:
        return {"status": "wait for trainer to start"}
    if asked.group_size > run.batch_size:
        raise Refused(f"group_size {asked.group_size} is above the trainer's batch_size {run.batch_size}")
    if len(atropos.envs) >= MAX_ENVIRONMENTS:
        raise Refused(f"{MAX_ENVIRONMENTS} environments are registered; reset the run or start another")
    env = RegisteredEnv(**asked.model_dump(), name=_free_name(queue, asked.desired_name or "env"))
    atropos.envs.append(env)
    queue.join(env.name, env.share)
    queue.last_heard[env.name] = queue.last_group[env.name] = queue.clock()
    _fit_capacity(queue)
    return {
        "status": "success",
        "env_id": len(atropos.envs) - 1,
        "wandb_name": env.name,
        "checkpoint_dir": run.checkpoint_dir,
        "starting_step": queue.state.step,
        "checkpoint_interval": run.save_checkpoint_interval,
        "num_steps": run.num_steps,
    }


def disconnect_env(queue: TrajectoryQueue, env_id: int) -> None:
    """Raises `Unknown`."""
    find_env(queue, env_id).connected = False
    _fit_capacity(queue)
    queue.ledger.dirty = True


def find_env(queue: TrajectoryQueue, env_id: int) -> RegisteredEnv:
    envs = queue.state.atropos.envs
    if not 0 <= env_id < len(envs):
        raise Unknown(f"env_id {env_id} is not registered ({len(envs)} environments are); POST /register-env first")
    return envs[env_id]


def line_of(queue: TrajectoryQueue, env_id: int | None) -> str:
    """The line an upload waits in. Raises `Unknown`."""
    if env_id is not None:
        return find_env(queue, env_id).name
    if ANONYMOUS not in queue.ledger.weights:
        queue.join(ANONYMOUS, 1.0)
    return ANONYMOUS


def check_size(queue: TrajectoryQueue, num_sequences: int, longest: int, own: Registration | None) -> None:
    """Raises `Refused` for a group that no trainer here could take."""
    run = registration(queue, own)
    if run is None:
        return
    if num_sequences > run.batch_size:
        raise Refused(f"the group has {num_sequences} sequences, above the trainer's batch_size {run.batch_size}")
    if 0 < run.max_token_len < longest:
        raise Refused(f"a sequence has {longest} tokens, above the trainer's max_token_len {run.max_token_len}")


def awaiting_pack(queue: TrajectoryQueue, env: RegisteredEnv) -> int:
    """Sequences in groups of another size than registered, beyond whole packs of that size: theirs to report, not to
    hold back."""
    odd = [t.num_rollouts for t in _queued(queue) if t.environment == env.name and t.num_rollouts != env.group_size]
    return sum(odd) % env.group_size


@dataclass(frozen=True, slots=True)
class Batch:
    batch_id: str
    tickets: list[Ticket]


def next_batch(queue: TrajectoryQueue, *, sending: Collection[str]) -> Batch | str:
    """The oldest batch that was not wholly sent to anybody and is not being sent now; otherwise a new one; otherwise
    why there is none."""
    if queue.state.learner != TRAINER:
        return why_no_batch(queue)
    queue.expire()
    if not (queue.learner_heard and queue.state.atropos.started):
        queue.learner_heard = queue.state.atropos.started = queue.ledger.dirty = True
    for ticket in queue.ledger.within(TicketState.LEASED):
        if ticket.lease_id and ticket.lease_id not in sending:
            return _leased(queue, ticket.lease_id)
    why = why_no_batch(queue)
    if why:
        return why
    tickets, atropos = _queued(queue), queue.state.atropos
    candidates = [Candidate(ticket.environment, ticket.num_rollouts) for ticket in tickets]
    run = _registered(atropos)
    waited = atropos.passed_over >= BATCHES_AHEAD
    indices = choose(candidates, run.batch_size, minima=_promised(queue, run), with_oldest=waited)
    atropos.passed_over = 0 if indices[0] == 0 else atropos.passed_over + 1
    return Batch(batch_id := uuid.uuid4().hex, queue.hand_out([tickets[i] for i in indices], batch_id))


def sent(queue: TrajectoryQueue, batch_id: str) -> None:
    """The batch reached the trainer: one step, on disk for some more in case the trainer dies with it."""
    held, state = _leased(queue, batch_id).tickets, queue.state
    if not held or state.learner != TRAINER:
        return
    groups = [ticket.group_id for ticket in held if ticket.group_id is not None]
    queue.acknowledge(groups, learner=TRAINER, step=state.step + 1, policy_version=state.policy_version + 1)
    kept = min(BATCHES_KEPT, 2 * max(1, _registered(state.atropos).save_checkpoint_interval))
    queue.commit(learner=TRAINER, step=max(0, state.step - kept))


def why_no_batch(queue: TrajectoryQueue) -> str:
    """Why a trainer of this wire gets no batch now, and who owes what; empty when it gets one."""
    if queue.state.learner != TRAINER:
        return "no trainer is registered (POST /register)"
    run, tickets = _registered(queue.state.atropos), _queued(queue)
    total = sum(ticket.num_rollouts for ticket in tickets)
    if total < run.batch_size:
        return f"{total} of {run.batch_size} sequences are queued: {_debts(queue) or 'no environment has registered'}"
    if queue.ledger.num_free <= 0:
        return ""
    short = [
        f"{name!r} has {_num_queued(tickets, name)} of the {wanted} sequences that min_batch_allocation promises it, "
        f"and is waited for {PATIENCE_SECONDS - _silence(queue, name):.0f} s more"
        for name, wanted in _promised(queue, run).items()
        if _num_queued(tickets, name) < wanted and _silence(queue, name) < PATIENCE_SECONDS
    ]
    return "; ".join(short)


def status(queue: TrajectoryQueue) -> dict[str, Any]:
    return {"current_step": queue.state.step, "queue_size": queue.ledger.count(TicketState.QUEUED)}


def status_env(queue: TrajectoryQueue, env_id: int, own: Registration | None) -> dict[str, Any]:
    """Queue sizes in groups of this environment's size. Raises `Unknown`."""
    env, run, tickets = find_env(queue, env_id), registration(queue, own), _queued(queue)
    queue.last_heard[env.name] = queue.clock()
    sizes = [ticket.num_rollouts for ticket in tickets]
    group_size = max([env.group_size, *(t.num_rollouts for t in tickets if t.environment == env.name)])
    own_sequences = _num_queued(tickets, env.name)
    promised = {} if run is None else _promised(queue, run)
    others = sum(
        max(0, _num_queued(tickets, name) - promised.get(name, 0))
        for name in {ticket.environment for ticket in tickets} - {env.name}
    )
    present = _present(queue, env)
    total = sum(e.max_token_length * max(0.0, e.weight) for e in present)
    asked = sum(e.min_batch_allocation or 0.0 for e in present)
    return {
        "current_step": queue.state.step,
        "queue_size": (own_sequences + others) // group_size,
        "unallocated_fraction": 1.0 - min(asked, 1.0),
        "self_queue_size": own_sequences // group_size,
        "max_group_size": max(sizes, default=1),
        "env_weight": max(MIN_WEIGHT, env.max_token_length * env.weight / total if total else 0.0),
    }


def reset(queue: TrajectoryQueue) -> None:
    """Forgets trainer, environments and groups. Raises `Refused` where the run's own learner trains."""
    state = queue.state
    if state.learner not in ("", TRAINER):
        raise Refused("the groups are those of a running syncline learner; stop the run instead of resetting it")
    _forget(queue, LIVE)
    for env in state.atropos.envs:
        queue.ledger.weights.pop(env.name, None)
        state.lines.pop(env.name, None)
    state.learner, state.policy_version, state.training, state.terms = "", -1, False, None
    state.atropos = AtroposState()
    queue.asks.clear()  # uploads that wait were of environments that are no more
    queue.learner_heard = False


def _forget(queue: TrajectoryQueue, states: Collection[TicketState]) -> None:
    """What is in these states, and every count; not who takes part."""
    state = queue.state
    for ticket in queue.ledger.within(*states):
        queue.ledger.move(ticket, TicketState.DISCARDED)
    state.step, state.capacity, state.counters = 0, None, Counters()
    queue.ledger.dirty = True


def _leased(queue: TrajectoryQueue, batch_id: str) -> Batch:
    return Batch(batch_id, [t for t in queue.ledger.within(TicketState.LEASED) if t.lease_id == batch_id])


def _queued(queue: TrajectoryQueue) -> list[Ticket]:
    return queue.ledger.within(TicketState.QUEUED)


def _registered(atropos: AtroposState) -> Registration:
    """Whoever is called `TRAINER` has registered."""
    assert atropos.registration is not None
    return atropos.registration


def _num_queued(tickets: list[Ticket], environment: str) -> int:
    return sum(ticket.num_rollouts for ticket in tickets if ticket.environment == environment)


def _promised(queue: TrajectoryQueue, run: Registration) -> dict[str, int]:
    fractions = {e.name: e.min_batch_allocation for e in queue.state.atropos.envs if e.connected}
    return sequences_promised({name: f for name, f in fractions.items() if f is not None}, run.batch_size)


def _present(queue: TrajectoryQueue, asking: RegisteredEnv) -> list[RegisteredEnv]:
    return [
        env
        for env in queue.state.atropos.envs
        if env is asking
        or (env.connected and queue.clock() - queue.last_heard.get(env.name, queue.began) < PATIENCE_SECONDS)
    ]


def _silence(queue: TrajectoryQueue, name: str) -> float:
    """Seconds since it delivered a group or registered; since this server began, when that was before."""
    return queue.clock() - queue.last_group.get(name, queue.began)


def _debts(queue: TrajectoryQueue) -> str:
    tickets = _queued(queue)
    return ", ".join(
        f"{env.name!r} has {_num_queued(tickets, env.name)} queued, its last came {_silence(queue, env.name):.1f} s ago"
        for env in queue.state.atropos.envs
        if env.connected
    )


def _free_name(queue: TrajectoryQueue, desired: str) -> str:
    number = sum((env.desired_name or "env") == desired for env in queue.state.atropos.envs)
    while f"{desired}_{number}" in queue.ledger.weights:
        number += 1
    return f"{desired}_{number}"


def _capacity(atropos: AtroposState) -> int:
    """Groups of the smallest size registered that make `BATCHES_AHEAD` batches; enough of any size to make one."""
    batch_size = _registered(atropos).batch_size
    smallest = min((env.group_size for env in atropos.envs if env.connected), default=1)
    return max(batch_size, math.ceil(BATCHES_AHEAD * batch_size / smallest))


def _fit_capacity(queue: TrajectoryQueue) -> None:
    if queue.state.learner == TRAINER:
        queue.state.capacity = _capacity(queue.state.atropos)
