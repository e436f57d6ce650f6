"""What the trajectory queue remembers: one ticket an attempt at a task, one line an environment.

A ticket's life; "back" says that the task index is handed out again:

    permitted ──put──▶ queued ──lease──▶ leased ──acknowledge──▶ consumed ──commit──▶ trained
        │                │ ▲               │                        │
        │                │ └───────────────┴── lease expired, start─┘
        ▼                ▼
    returned, expired,   stale, rewound (back)
    failed (back)        discarded (not back: `/reset_data`)
    replaced (not back: a group whose rewards are all equal)
"""

import bisect
from dataclasses import dataclass, field
from enum import StrEnum

from syncline.trajectory.atropos_wire import AtroposState
from syncline.trajectory.wire import RunTerms


class TicketState(StrEnum):
    PERMITTED = "permitted"
    QUEUED = "queued"
    LEASED = "leased"
    CONSUMED = "consumed"
    TRAINED = "trained"
    FAILED = "failed"
    REPLACED = "replaced"
    STALE = "stale"
    REWOUND = "rewound"
    RETURNED = "returned"
    EXPIRED = "expired"
    DISCARDED = "discarded"


class Wire(StrEnum):
    """How a group came, which is how its payload is written."""

    SYNCLINE = "syncline"
    ATROPOS = "atropos"


HOLDS_GROUP = (TicketState.QUEUED, TicketState.LEASED, TicketState.CONSUMED)
LIVE = (TicketState.PERMITTED, *HOLDS_GROUP)
OUTSTANDING = (TicketState.PERMITTED, TicketState.QUEUED, TicketState.LEASED)


@dataclass(slots=True)
class Ticket:
    """One permit and the group put under it. The group's tokens are the store's, not the queue's."""

    permit_id: str
    environment: str
    task_index: int
    worker: str
    state: TicketState = TicketState.PERMITTED
    ceiling: int | None = None
    """Newest version its group may hold: set when the learner restarts, because later ones died with it."""
    group_id: str | None = None
    sequence: int | None = None
    """Place in the order of acceptance."""
    oldest: int | None = None
    newest: int | None = None
    lease_id: str | None = None
    step: int | None = None
    """The step that trained on it."""
    num_rollouts: int = 0
    wire: Wire = Wire.SYNCLINE
    digest: str | None = None
    """Of a group that came without a permit: what tells its repetition from another group."""


@dataclass(slots=True)
class Line:
    """The task indices of one environment, and what it has been granted."""

    next_index: int = 0
    returned: list[int] = field(default_factory=list)
    """Ascending: the lowest goes out first."""
    faults: dict[int, int] = field(default_factory=dict)
    granted: int = 0
    num_tasks: int | None = None
    """Of a pass, as the environment's worker said last."""
    share: float = 0.0
    """Virtual time up to which it has been served: permits over weight."""

    def take_index(self) -> int:
        if self.returned:
            return self.returned.pop(0)
        self.next_index += 1
        return self.next_index - 1

    def give_index(self, index: int) -> None:
        bisect.insort(self.returned, index)


@dataclass(slots=True)
class Counters:
    """Since the run began. `granted` permits each end as accepted, failed, replaced, returned, expired, rewound, or
    are held."""

    granted: int = 0
    accepted: int = 0
    returned: int = 0
    failed: int = 0
    replaced: int = 0
    unreplaced: int = 0
    """Groups of equal rewards that were accepted, because the step's refills were used up."""
    abandoned: int = 0
    stale: int = 0
    rewound: int = 0
    expired_permits: int = 0
    expired_leases: int = 0
    trained: int = 0


@dataclass(slots=True)
class QueueState:
    """Everything beside the tickets that must survive the process."""

    policy_version: int = -1
    """-1: no learner has started yet."""
    step: int = 0
    learner: str = ""
    capacity: int | None = None
    """Groups, where the learner itself says how many it wants at once; `None`: what the run's configuration gives."""
    training: bool = False
    """A batch is out: the engine may serve `policy_version + 1` before the learner has said so."""
    num_refills: int = 0
    """Groups of equal rewards since the last acknowledgement, as far as they were replaced, and one more."""
    next_sequence: int = 0
    virtual_time: float = 0.0
    counters: Counters = field(default_factory=Counters)
    lines: dict[str, Line] = field(default_factory=dict)
    atropos: AtroposState = field(default_factory=AtroposState)
    terms: RunTerms | None = None
    """What the learner said of its run, where no configuration does."""
