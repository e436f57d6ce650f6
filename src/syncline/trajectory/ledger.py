"""The books of the trajectory queue: which ticket is where, and the only ways one moves. Rules are `queue`'s.

Every move is noted in `changed`, for the store; what is out has a deadline on the injected clock.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from syncline.trajectory.tickets import LIVE, OUTSTANDING, Line, QueueState, Ticket, TicketState

SETTLED_REMEMBERED = 10_000


@dataclass(frozen=True, slots=True)
class QueueLimits:
    groups_per_step: int
    rollouts_per_group: int
    max_staleness: int
    lease_seconds: float
    max_refills: int = 0
    """Groups of equal rewards that may be replaced between two acknowledgements."""
    max_faults: int = 3
    """A task that fails more often than this is given up."""
    admits_environments: bool = False
    """Those the configuration does not name take part too, from when they first ask."""
    admits_runs: bool = False
    """There is no configuration: the learner says what holds (`RunTerms`), and another run's learner begins anew."""

    @property
    def capacity(self) -> int:
        return self.groups_per_step * (1 + self.max_staleness)


class Ledger:
    """Live tickets by permit id, the last settled ones (so that a repeated request is recognized), and the state."""

    def __init__(
        self,
        limits: QueueLimits,
        weights: Mapping[str, float],
        *,
        clock: Callable[[], float],
        state: QueueState | None = None,
        tickets: Iterable[Ticket] = (),
    ) -> None:
        self._limits = limits
        self.clock = clock
        self.state = state or QueueState()
        self.weights = dict(weights)
        self.live: dict[str, Ticket] = {}
        self.dirty = False
        self._settled: dict[str, Ticket] = {}
        self._deadlines: dict[str, float] = {}
        self._changed: dict[str, Ticket] = {}
        self._forgotten: list[str] = []
        for name in weights:
            self.state.lines.setdefault(name, Line())
        for name in self.state.lines:
            self.weights.setdefault(name, self.state.atropos.weight_of(name))
        for ticket in tickets:
            self._file(ticket)

    @property
    def limits(self) -> QueueLimits:
        """The configuration's, or what the learner said of its run."""
        terms = self.state.terms
        if terms is None:
            return self._limits
        return replace(
            self._limits,
            groups_per_step=terms.groups_per_step,
            rollouts_per_group=terms.rollouts_per_group,
            max_staleness=terms.max_staleness,
            max_refills=terms.max_refills,
        )

    def find(self, permit_id: str) -> Ticket | None:
        return self.live.get(permit_id) or self._settled.get(permit_id)

    def known(self) -> list[Ticket]:
        """Every ticket remembered, settled ones first."""
        return [*self._settled.values(), *self.live.values()]

    def within(self, *states: TicketState) -> list[Ticket]:
        """Live tickets in these states, in the order of acceptance; permits first."""
        found = [ticket for ticket in self.live.values() if ticket.state in states]
        return sorted(found, key=lambda ticket: -1 if ticket.sequence is None else ticket.sequence)

    def count(self, *states: TicketState, environment: str | None = None) -> int:
        return sum(t.state in states and environment in (None, t.environment) for t in self.live.values())

    @property
    def capacity(self) -> int:
        return self.state.capacity or self.limits.capacity

    @property
    def num_free(self) -> int:
        """Permits that may still be granted; negative after a restart has queued consumed groups again."""
        return self.capacity - self.count(*OUTSTANDING)

    def seconds_to_deadline(self) -> float:
        """Until the next permit or lease expires; infinite when none is out."""
        return max(0.0, min(self._deadlines.values(), default=math.inf) - self.clock())

    def overdue(self) -> list[Ticket]:
        now = self.clock()
        return [self.live[permit_id] for permit_id, deadline in self._deadlines.items() if deadline <= now]

    def take_changes(self) -> list[Ticket]:
        """Tickets changed since the last call."""
        changed, self._changed, self.dirty = list(self._changed.values()), {}, False
        return changed

    def take_forgotten(self) -> list[str]:
        """Permit ids of the tickets settled so long ago that nobody asks for them, since the last call."""
        forgotten, self._forgotten = self._forgotten, []
        return forgotten

    def issue(self, permit_id: str, environment: str, *, worker: str) -> Ticket:
        """A permit for the environment's next task index."""
        line = self.state.lines[environment]
        line.granted += 1
        self.state.counters.granted += 1
        ticket = Ticket(permit_id, environment, line.take_index(), worker)
        self.move(ticket, TicketState.PERMITTED)
        return ticket

    def move(self, ticket: Ticket, to: TicketState) -> None:
        ticket.state = to
        self._file(ticket)
        self.touch(ticket)

    def touch(self, ticket: Ticket) -> None:
        self._changed[ticket.permit_id] = ticket
        self.dirty = True

    def enqueue(self, ticket: Ticket) -> None:
        """At the end of the queue the first time, at its old place when it comes back."""
        if ticket.sequence is None:
            ticket.sequence = self.state.next_sequence
            self.state.next_sequence += 1
            self.state.counters.accepted += 1
        ticket.lease_id = ticket.step = None
        self.move(ticket, TicketState.QUEUED)

    def train(self, ticket: Ticket) -> None:
        self.state.counters.trained += 1
        self.move(ticket, TicketState.TRAINED)

    def replace(self, ticket: Ticket) -> None:
        """Settles a ticket whose group teaches nothing; its task is done with, and its place free for another."""
        self.state.counters.replaced += 1
        self.state.lines[ticket.environment].faults.pop(ticket.task_index, None)
        self.move(ticket, TicketState.REPLACED)

    def hand_back(self, ticket: Ticket, end: TicketState, *, faulty: bool = False) -> None:
        """Settles a ticket untrained; its task goes out again, unless it has failed too often."""
        line, counters = self.state.lines[ticket.environment], self.state.counters
        name = "expired_permits" if end is TicketState.EXPIRED else end.value
        setattr(counters, name, getattr(counters, name) + 1)
        faults = line.faults.get(ticket.task_index, 0) + faulty
        if faults > self.limits.max_faults:
            del line.faults[ticket.task_index]
            counters.abandoned += 1
        else:
            if faults:
                line.faults[ticket.task_index] = faults
            line.give_index(ticket.task_index)
        self.move(ticket, end)

    def _file(self, ticket: Ticket) -> None:
        """Puts a ticket where its state belongs: among the live or the settled, and on the clock or off it."""
        self.live.pop(ticket.permit_id, None)
        self._deadlines.pop(ticket.permit_id, None)
        (self.live if ticket.state in LIVE else self._settled)[ticket.permit_id] = ticket
        if ticket.state in (TicketState.PERMITTED, TicketState.LEASED):
            self._deadlines[ticket.permit_id] = self.clock() + self.limits.lease_seconds
        if len(self._settled) > SETTLED_REMEMBERED:
            self._forgotten.append(next(iter(self._settled)))
            del self._settled[self._forgotten[-1]]
