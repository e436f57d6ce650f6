"""The trajectory queue: a state machine without I/O; time and names come in from outside.

Environments ask for permits and put groups; the learner starts, leases, acknowledges and commits. What is out
(permits + queued + leased) never lets a permit exceed `capacity`, the back-pressure: with `max_staleness` 0 the next
permits appear only with the acknowledgement that names the new policy version, so sampling is strictly on-policy.
No environment can block another: permits go only to those asking now (`shares`), and what an environment or the
learner holds comes back by itself after `lease_seconds`. Every method first expires what is overdue.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from enum import StrEnum

from syncline.errors import TrajectoryError
from syncline.trajectory.ledger import Ledger, QueueLimits
from syncline.trajectory.shares import Ask, allot, start_tag
from syncline.trajectory.tickets import HOLDS_GROUP, Line, QueueState, Ticket, TicketState, Wire
from syncline.trajectory.wire import MAX_NAME
from syncline.types import RolloutGroup, RolloutStatus

REPEAT_SECONDS = 300.0
"""How long a client of another framework goes on sending a group it got no answer for."""

_SCORED = (RolloutStatus.COMPLETED, RolloutStatus.TRUNCATED)


class Refused(TrajectoryError):
    """The request contradicts the state of the queue. Nothing was changed by it."""


class PutOutcome(StrEnum):
    """What became of a group. Only a group `ACCEPTED` (now or before) or `UNREPLACED` is stored."""

    EXPIRED = "expired"
    """It came after its permit's time, and its task is another permit's."""

    ACCEPTED = "accepted"
    UNREPLACED = "unreplaced"
    """The first that was accepted though its rewards are all equal: no more of this step's are replaced."""
    FAILED = "failed"
    REPLACED = "replaced"
    REWOUND = "rewound"


_OUTCOMES = {
    TicketState.FAILED: PutOutcome.FAILED,
    TicketState.REWOUND: PutOutcome.REWOUND,
    TicketState.REPLACED: PutOutcome.REPLACED,
}
"""Of a group that was put before; every other one is held or was."""


class TrajectoryQueue:
    def __init__(
        self,
        limits: QueueLimits,
        weights: Mapping[str, float],
        *,
        clock: Callable[[], float],
        new_id: Callable[[], str],
        state: QueueState | None = None,
        tickets: Iterable[Ticket] = (),
    ) -> None:
        """`state` and `tickets` are what a predecessor left; what they hold is granted `lease_seconds` anew."""
        self.ledger = Ledger(limits, weights, clock=clock, state=state, tickets=tickets)
        self.state = self.ledger.state
        self.clock = clock
        self.asks: dict[tuple[str, str], Ask] = {}
        self.began = clock()
        self.last_heard: dict[str, float] = {}
        self.last_group: dict[str, float] = {}
        self.unanswered: dict[str, float] = {}
        """Digest → until when: groups whose sender may not know that they were taken, and may send them again."""
        if state is not None:
            self.unanswered = {t.digest: self.began + REPEAT_SECONDS for t in self.ledger.known() if t.digest}
        self.learner_heard = False
        """By this queue, not by a predecessor whose state it took over: until then the engine may serve anything."""
        self._new_id = new_id

    @property
    def limits(self) -> QueueLimits:
        return self.ledger.limits

    # Environments

    def ask(self, ask: Ask, *, held: Collection[str]) -> None:
        """Notes that a worker waits for permits, until `grant` gave it some or `withdraw` says it waits no more.

        Permits it should have but does not hold were lost with an answer or its predecessor, and are taken back.
        """
        if ask.environment not in self.ledger.weights and self.limits.admits_environments:
            self.join(ask.environment, 1.0)
        if ask.environment not in self.ledger.weights:
            known = sorted(self.ledger.weights)
            raise Refused(f"environment {ask.environment!r} is not part of this run; known: {known}")
        self.expire()
        self.last_heard[ask.environment] = self.clock()
        self.state.lines[ask.environment].num_tasks = ask.num_tasks
        for ticket in self.ledger.within(TicketState.PERMITTED):
            if (ticket.environment, ticket.worker) == ask.key and ticket.permit_id not in held:
                self.ledger.hand_back(ticket, TicketState.RETURNED)
        self.asks[ask.key] = ask

    def withdraw(self, ask: Ask) -> None:
        """Ends an ask, answered or not; what was kept for it is free to others."""
        if self.asks.get(ask.key) is ask:
            del self.asks[ask.key]
            self.ledger.dirty = True

    def join(self, environment: str, weight: float) -> None:
        """An environment the configuration does not name takes part from now on, with nothing owed to it."""
        self.ledger.weights[environment] = weight
        self.state.lines.setdefault(environment, Line(share=self.state.virtual_time))
        self.ledger.dirty = True

    def grant(self, ask: Ask, *, room: int | None = None) -> list[Ticket]:
        """The asker's fair part of the free capacity; when it gets any, its ask is answered and gone. `room`: groups
        that may still be stored."""
        self.expire()
        if self.asks.get(ask.key) is not ask or not self.learner_heard:
            return []
        tags = {name: self._start_tag(name) for name, _ in self.asks}
        free = self.ledger.num_free if room is None else min(self.ledger.num_free, room)
        parts = allot(list(self.asks.values()), tags, weights=self.ledger.weights, free=free)
        granted = [self._permit(ask) for _ in range(parts[ask.key])]
        if granted:
            self.withdraw(ask)
        return granted

    def put(self, group: RolloutGroup, permit_id: str) -> PutOutcome:
        """Takes the group sampled under a permit. The same group under the same permit again changes nothing."""
        ticket = self._ticket(permit_id)
        if ticket.group_id == group.group_id:
            return _OUTCOMES.get(ticket.state, PutOutcome.ACCEPTED)
        if ticket.state is TicketState.EXPIRED:
            return PutOutcome.EXPIRED
        self._check_put(group, ticket)
        ticket.group_id, ticket.num_rollouts = group.group_id, len(group.rollouts)
        ticket.oldest, ticket.newest = group.oldest_policy_version, group.newest_policy_version
        if not any(rollout.status in _SCORED for rollout in group.rollouts):
            self.ledger.hand_back(ticket, TicketState.FAILED, faulty=True)
            return PutOutcome.FAILED
        if _above(ticket.newest, ticket.ceiling):
            self.ledger.hand_back(ticket, TicketState.REWOUND)
            return PutOutcome.REWOUND
        outcome = self._worth({rollout.reward for rollout in group.rollouts if rollout.reward is not None})
        if outcome is PutOutcome.REPLACED:
            self.ledger.replace(ticket)
        else:
            self.ledger.enqueue(ticket)
        return outcome

    def admit(self, ask: Ask, *, rewards: Sequence[float], digest: str) -> tuple[Ticket, PutOutcome] | None:
        """Takes a group that came without a permit, over the Atropos wire, once it is its environment's turn: queues
        it, or replaces it, as one that came with a permit."""
        for ticket in self.grant(ask):
            ticket.group_id, ticket.num_rollouts = ticket.permit_id, len(rewards)
            ticket.wire, ticket.digest = Wire.ATROPOS, digest
            self.last_group[ask.environment] = self.clock()
            outcome = self._worth(set(rewards))
            if outcome is PutOutcome.REPLACED:
                self.ledger.replace(ticket)
            else:
                self.ledger.enqueue(ticket)
            return ticket, outcome
        return None

    def is_repetition(self, digest: str) -> bool:
        """Whether a group without a permit is one that was taken before, unknown to its sender. True once a group."""
        until = self.unanswered.pop(digest, None)
        return until is not None and self.clock() < until

    def note_unanswered(self, digest: str) -> None:
        """A group without a permit was taken, and its sender had gone before it could be told."""
        self.unanswered[digest] = self.clock() + REPEAT_SECONDS

    def give_back(self, permit_id: str, reason: str) -> None:
        """Ends a permit without a group. An empty `reason` says it was not used; any other counts against the task."""
        ticket = self._ticket(permit_id)
        if ticket.group_id is not None:
            raise Refused(f"permit {permit_id!r} cannot be given back: group {ticket.group_id!r} was put under it")
        if ticket.state is TicketState.PERMITTED:
            self.ledger.hand_back(ticket, TicketState.RETURNED, faulty=bool(reason))

    # The learner

    def start(
        self,
        *,
        learner: str,
        policy_version: int,
        step: int,
        capacity: int | None = None,
        resumed_version: int | None = None,
    ) -> None:
        """A learner begins after `step`, serving `policy_version`: what later steps consumed is queued again,
        in its old order, and what was sampled under later versions is dropped. Only this learner is heard from now on.
        `capacity`, in groups, is set where the learner knows better than the configuration; `resumed_version` where
        versions between it and `policy_version` are those of a life that is lost.
        """
        self.expire()
        kept = policy_version if resumed_version is None else resumed_version
        for ticket in self.ledger.within(*HOLDS_GROUP):
            if ticket.step is not None and ticket.step <= step:
                self.ledger.train(ticket)
            elif _above(ticket.newest, kept):
                self.ledger.hand_back(ticket, TicketState.REWOUND)
            elif ticket.state is not TicketState.QUEUED:
                self.ledger.enqueue(ticket)
        for ticket in self.ledger.within(TicketState.PERMITTED):
            ticket.ceiling = kept if ticket.ceiling is None else min(ticket.ceiling, kept)
            self.ledger.touch(ticket)
        state = self.state
        state.learner, state.policy_version, state.step, state.training = learner, policy_version, step, False
        state.capacity = capacity
        state.num_refills = 0
        self.learner_heard = True
        self.ledger.dirty = True

    def lease(self, num_groups: int, *, learner: str, lease_id: str) -> list[Ticket]:
        """Exactly `num_groups`, oldest first, or none yet. A lease that is out is answered again, not doubled."""
        self.expire()
        self._check_learner(learner)
        if num_groups > self.ledger.capacity:
            raise Refused(
                f"num_groups {num_groups} can never be queued at once: capacity is {self.ledger.capacity} "
                "(groups_per_step x (1 + max_staleness)); ask for fewer"
            )
        held = [ticket for ticket in self.ledger.within(TicketState.LEASED) if ticket.lease_id == lease_id]
        if held:
            return held
        self._drop_stale()
        ready = self.ready()[:num_groups]
        return self.hand_out(ready, lease_id) if len(ready) == num_groups else []

    def hand_out(self, tickets: list[Ticket], lease_id: str) -> list[Ticket]:
        """Leases these queued groups."""
        for ticket in tickets:
            ticket.lease_id = lease_id
            self.ledger.move(ticket, TicketState.LEASED)
        self.state.training = True
        return tickets

    def ready(self) -> list[Ticket]:
        """What may be leased: not groups of a version the learner has not announced yet. First those that the next
        version makes too old, or who sampled long would be the one to be dropped; then in the order they came. Nobody
        waits for such that are still sampled: a step takes longer than their tokens are worth (docs/log.md)."""
        served, oldest_next = self.state.policy_version, self.state.policy_version - self.limits.max_staleness
        found = [t for t in self.ledger.within(TicketState.QUEUED) if not _above(t.newest, served)]
        return sorted(found, key=lambda t: t.oldest is None or t.oldest > oldest_next)

    def acknowledge(self, group_ids: Collection[str], *, learner: str, step: int, policy_version: int) -> None:
        """`step` trained on these groups and `policy_version` is served now. Taken also after the lease expired, as
        long as nobody else leased them: they *were* trained on. Repeating the last acknowledgement changes nothing.
        """
        self.expire()
        self._check_learner(learner)
        by_group = {ticket.group_id: ticket for ticket in self.ledger.within(*HOLDS_GROUP)}
        unknown = [group_id for group_id in group_ids if group_id not in by_group]
        if unknown:
            raise Refused(
                f"groups {unknown} are not held for the learner; they were dropped, committed or never leased"
            )
        tickets = [by_group[group_id] for group_id in group_ids]
        if all(ticket.step == step for ticket in tickets):
            return
        self._check_progress(tickets, step=step, policy_version=policy_version)
        for ticket in tickets:
            ticket.step = step
            self.ledger.move(ticket, TicketState.CONSUMED)
        self.state.step, self.state.policy_version, self.state.training = step, policy_version, False
        self.state.num_refills = 0
        self._drop_stale()

    def commit(self, *, learner: str, step: int) -> None:
        """A checkpoint holds `step`: what it and earlier steps consumed is final."""
        self.expire()
        self._check_learner(learner)
        if step > self.state.step:
            raise Refused(f"step {step} cannot be committed: the last step acknowledged is {self.state.step}")
        for ticket in self.ledger.within(TicketState.CONSUMED):
            if ticket.step is not None and ticket.step <= step:
                self.ledger.train(ticket)

    # Rules

    def _ticket(self, permit_id: str) -> Ticket:
        self.expire()
        ticket = self.ledger.find(permit_id)
        if ticket is None:
            raise Refused(f"permit {permit_id!r} is unknown; it was never granted, or too long ago to be remembered")
        self.last_heard[ticket.environment] = self.clock()
        return ticket

    def _check_learner(self, learner: str) -> None:
        if learner != self.state.learner:
            raise Refused(f"learner {learner!r} is not the one that started last ({self.state.learner!r}); start first")
        if not self.learner_heard:
            self.learner_heard = True
            self.ledger.dirty = True

    def _check_put(self, group: RolloutGroup, ticket: Ticket) -> None:
        permit = f"permit {ticket.permit_id!r}"
        if ticket.group_id is not None:
            raise Refused(f"{permit} is used up: group {ticket.group_id!r} was put under it")
        if ticket.state is not TicketState.PERMITTED:
            raise Refused(f"{permit} is {ticket.state}: task {ticket.task_index} is handed out again")
        if (group.environment, group.task_index) != (ticket.environment, ticket.task_index):
            raise Refused(
                f"{permit} is for task {ticket.task_index} of {ticket.environment!r}, "
                f"but the group holds task {group.task_index} of {group.environment!r}"
            )
        size = self.limits.rollouts_per_group
        if len(group.rollouts) != size:
            raise Refused(
                f"group {group.group_id!r} has {len(group.rollouts)} rollouts; run.rollouts_per_group is {size}"
            )
        if len(group.group_id) > MAX_NAME:
            raise Refused(
                f"group_id {group.group_id[:40]!r}... has more than {MAX_NAME} characters; no learner names it"
            )
        if any(other.group_id == group.group_id for other in self.ledger.live.values()):
            raise Refused(f"group_id {group.group_id!r} is taken by another group of this run")
        self._check_versions(group, ticket)

    def _worth(self, rewards: Collection[float]) -> PutOutcome:
        """Dynamic sampling (DAPO, arXiv 2503.14476 §3.2): equal rewards have no gradient, so another task is sampled.

        `max_refills` bounds what a step may cost; a task family that is all right or all wrong still gets trained on.
        """
        refills, state = self.limits.max_refills, self.state
        if not refills or len(rewards) > 1:
            return PutOutcome.ACCEPTED
        if state.num_refills < refills:
            state.num_refills += 1
            return PutOutcome.REPLACED
        state.counters.unreplaced += 1
        first, state.num_refills = state.num_refills == refills, refills + 1
        return PutOutcome.UNREPLACED if first else PutOutcome.ACCEPTED

    def _check_versions(self, group: RolloutGroup, ticket: Ticket) -> None:
        """Only versions served so far, or the one a step in progress is about to announce."""
        for i, rollout in enumerate(group.rollouts):
            if rollout.status in _SCORED and not any(sample.versions for sample in rollout.samples):
                raise Refused(f"rollouts.{i} is {rollout.status} but no token in it carries a policy version")
        newest, served = group.newest_policy_version, self.state.policy_version
        if ticket.ceiling is None and _above(newest, served + self.state.training):
            raise Refused(f"group {group.group_id!r} holds tokens of policy version {newest}, but {served} is served")

    def _check_progress(self, tickets: list[Ticket], *, step: int, policy_version: int) -> None:
        consumed = [ticket.group_id for ticket in tickets if ticket.state is TicketState.CONSUMED]
        if consumed:
            raise Refused(f"groups {consumed} were trained on in an earlier step")
        if step <= self.state.step:
            raise Refused(f"step {step} must be above {self.state.step}, the last one")
        if policy_version < self.state.policy_version:
            raise Refused(f"policy_version {policy_version} is below {self.state.policy_version}, the one served")

    def _permit(self, ask: Ask) -> Ticket:
        line, start = self.state.lines[ask.environment], self._start_tag(ask.environment)
        line.share = start + 1 / self.ledger.weights[ask.environment]
        self.state.virtual_time = max(self.state.virtual_time, start)
        return self.ledger.issue(self._new_id(), ask.environment, worker=ask.worker)

    def _start_tag(self, environment: str) -> float:
        share, weight = self.state.lines[environment].share, self.ledger.weights[environment]
        return start_tag(share, self.state.virtual_time, weight=weight, credit=self.ledger.capacity)

    def expire(self) -> None:
        """Takes back what is overdue. Every other method does so first."""
        overdue = self.ledger.overdue()
        leases = {ticket.lease_id for ticket in overdue if ticket.state is TicketState.LEASED}
        self.state.counters.expired_leases += len(leases)
        for ticket in overdue:
            if ticket.state is TicketState.LEASED:
                self.ledger.enqueue(ticket)
            else:
                self.ledger.hand_back(ticket, TicketState.EXPIRED)

    def _drop_stale(self) -> None:
        """The batch leased now is trained as the served version, so that is what age counts from."""
        for ticket in self.ledger.within(TicketState.QUEUED):
            if ticket.oldest is not None and self.state.policy_version - ticket.oldest > self.limits.max_staleness:
                self.ledger.hand_back(ticket, TicketState.STALE)


def _above(version: int | None, limit: int | None) -> bool:
    return version is not None and limit is not None and version > limit
