"""Whether a batch should wait for groups that the next version makes too old: the queue itself, with simulated time.

    python benchmarks/stale_groups.py

A task takes the same time whenever it is sampled, 10 s in the median; engines sample every permit at once, at no cost
to the others. `leased at once` is what the queue does: such a group is dropped when it comes, and its task sampled
again. `waited for` leases nothing until all of them are there. Told are seconds a step, the share of groups that were
dropped, and how long the tasks took that were trained on: less than the mean of all means that long ones were lost.
"""

import heapq
import itertools
import math
import random
from statistics import fmean

from syncline.testing import make_group
from syncline.trajectory.ledger import QueueLimits
from syncline.trajectory.queue import TrajectoryQueue
from syncline.trajectory.shares import Ask
from syncline.trajectory.tickets import Ticket, TicketState

GROUPS, STEPS, MEDIAN_SECONDS = 16, 80, 10.0


class Run:
    def __init__(self, *, waits: bool, max_staleness: int, spread: float, learn_seconds: float) -> None:
        self.waits, self.max_staleness, self.spread, self.learn_seconds = waits, max_staleness, spread, learn_seconds
        self.now, self.step, self.rng, self.numbers = 0.0, 0, random.Random(0), itertools.count()
        limits = QueueLimits(GROUPS, 2, max_staleness, lease_seconds=math.inf)
        names = (f"p{number}" for number in itertools.count())
        self.queue = TrajectoryQueue(limits, {"tasks": 1.0}, clock=lambda: self.now, new_id=lambda: next(names))
        self.queue.start(learner="learner", policy_version=0, step=0)
        self.ends: list[tuple[float, int, Ticket | None]] = []
        self.begun: dict[str, int] = {}
        self.seconds: dict[int, float] = {}
        self.batch: list[Ticket] = []
        self.trained: list[float] = []

    def result(self) -> tuple[float, float, float]:
        """Seconds a step, share of groups dropped, mean seconds of the tasks trained on."""
        self._sample()
        while self.step < STEPS:
            self.now, _, ticket = heapq.heappop(self.ends)
            if ticket is None:
                self._learnt()
            else:
                name, version = f"g-{ticket.permit_id}", self.begun.pop(ticket.permit_id)
                group = make_group("tasks", ticket.task_index, group_id=name, policy_version=version)
                self.queue.put(group, ticket.permit_id)
            self._lease()
            self._sample()
        stale = self.queue.state.counters.stale
        return self.now / STEPS, stale / (stale + GROUPS * STEPS), fmean(self.trained)

    def _sample(self) -> None:
        ask = Ask("tasks", "0", GROUPS * (1 + self.max_staleness))
        self.queue.ask(ask, held=list(self.queue.ledger.live))
        for ticket in self.queue.grant(ask):
            seconds = self.seconds.setdefault(
                ticket.task_index, MEDIAN_SECONDS * self.rng.lognormvariate(0, self.spread)
            )
            self.begun[ticket.permit_id] = self.queue.state.policy_version
            heapq.heappush(self.ends, (self.now + seconds, next(self.numbers), ticket))
        self.queue.withdraw(ask)

    def _lease(self) -> None:
        permits = self.queue.ledger.within(TicketState.PERMITTED)
        oldest = min((self.begun[ticket.permit_id] for ticket in permits), default=self.step)
        if self.batch or (self.waits and self.step - oldest >= self.max_staleness):
            return
        self.batch = self.queue.lease(GROUPS, learner="learner", lease_id=f"step {self.step}")
        if self.batch:
            heapq.heappush(self.ends, (self.now + self.learn_seconds, next(self.numbers), None))

    def _learnt(self) -> None:
        self.step += 1
        self.trained += [self.seconds[ticket.task_index] for ticket in self.batch]
        ids = [ticket.group_id or "" for ticket in self.batch]
        self.queue.acknowledge(ids, learner="learner", step=self.step, policy_version=self.step)
        self.queue.commit(learner="learner", step=self.step)
        self.batch = []


def main() -> None:
    print("max_staleness  spread  learning   leased at once                  waited for")
    for max_staleness, spread, learn_seconds in itertools.product((1, 2, 4), (0.5, 1.0), (5.0, 15.0)):
        told = f"{max_staleness:>13}{spread:>8}{learn_seconds:>8.0f} s"
        for waits in (False, True):
            run = Run(waits=waits, max_staleness=max_staleness, spread=spread, learn_seconds=learn_seconds)
            seconds, dropped, mean = run.result()
            told += f"{seconds:>9.1f} s {dropped:>6.1%} dropped {mean:>6.1f} s"
        print(told, flush=True)


if __name__ == "__main__":
    main()
