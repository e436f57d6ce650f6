"""What crosses the wire between environments, server and learner: JSON, refused unless it is exactly right.

Unknown keys, numbers in quotes, NaN and infinities are faults; so is whatever a dataclass of `syncline.types`
refuses when built. A fault is a `Malformed` naming the path of the field.
"""

from collections.abc import Sequence
from typing import Annotated, Any, NewType, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from syncline.errors import TrajectoryError
from syncline.protocols import Permit
from syncline.trajectory.atropos_wire import Registration
from syncline.types import RolloutGroup

WIRE_VERSION = 1
MAX_POLL_SECONDS = 60.0

_STRICT = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)
_WireGroup = NewType("_WireGroup", RolloutGroup)
"""pydantic takes no config for a plain dataclass, but for a new name of it."""
_GROUP = TypeAdapter(_WireGroup, config=_STRICT)

MAX_NAME = 256
Name = Annotated[str, Field(min_length=1, max_length=MAX_NAME)]
Count = Annotated[int, Field(ge=0, lt=2**53)]
Positive = Annotated[int, Field(ge=1, lt=2**31)]
PollSeconds = Annotated[float, Field(ge=0, le=MAX_POLL_SECONDS)]


class Malformed(TrajectoryError):
    """A message is not what this wire carries; says where and why."""


class WireMessage(BaseModel):
    model_config = _STRICT


class PermitsRequest(WireMessage):
    environment: Name
    worker: Name
    """One sampling process of the environment; its successor after a crash has the same name."""
    num_permits: Positive
    held: tuple[Name, ...]
    """Every permit the worker holds. Others the server had given it were lost on the way, and are taken back."""
    timeout_seconds: PollSeconds
    num_tasks: Positive | None = None
    """Of a pass over the environment's tasks; `None`: they have no end."""


class PermitsAnswer(WireMessage):
    permits: tuple[Permit, ...]


class PutAnswer(WireMessage):
    outcome: str


class GiveBackRequest(WireMessage):
    reason: str
    """Empty: unused, nothing went wrong. Otherwise it counts against the task."""


class RunTerms(WireMessage):
    """What a server that was started for no run must know of one: the configuration's limits, and what environments of
    the Atropos wire are told."""

    run_id: str
    groups_per_step: Positive
    rollouts_per_group: Positive
    max_staleness: Count
    max_refills: Count
    registration: Registration


class StartRequest(WireMessage):
    learner: Name
    policy_version: Count
    step: Count
    terms: RunTerms | None = None
    resumed_version: Count | None = None
    """Its weights' version before it went on above those that engines had served: what was sampled under one between
    the two is dropped. `None`: there are none between."""


class LeaseRequest(WireMessage):
    learner: Name
    lease_id: Name
    """Chosen by the learner: asking again under the same name answers with the same groups."""
    num_groups: Positive
    timeout_seconds: PollSeconds
    read: tuple[Name, ...] | None = None
    """Groups it has read before they were leased, and is not sent again; `None`: it wants the batch in one answer."""


class LeaseAnswer(WireMessage):
    groups: tuple[RolloutGroup, ...]
    """Without `read`, `num_groups` of them, or none. With it, those not read yet: of the lease, or of what is ready for
    one that is not whole."""
    leased: tuple[Name, ...] = ()
    """All of the lease; none, while fewer than `num_groups` are ready."""
    why_waiting: str = ""


class AcknowledgeRequest(WireMessage):
    learner: Name
    group_ids: Annotated[tuple[Name, ...], Field(min_length=1)]
    step: Count
    policy_version: Count


class CommitRequest(WireMessage):
    learner: Name
    step: Count


class ErrorAnswer(WireMessage):
    error: str


M = TypeVar("M", bound=WireMessage)


def group_schema(ref_template: str) -> dict[str, Any]:
    """JSON schema of a group."""
    return _GROUP.json_schema(ref_template=ref_template)


def encode_group(group: RolloutGroup) -> bytes:
    return _GROUP.dump_json(_WireGroup(group))


def decode_group(body: bytes) -> RolloutGroup:
    """Raises `Malformed`, naming the field path of each fault (five at most)."""
    try:
        return _GROUP.validate_json(body)
    except ValidationError as error:
        raise Malformed(explain("RolloutGroup", error)) from error


def decode(model: type[M], body: bytes) -> M:
    """Raises `Malformed`, naming the field path of each fault (five at most)."""
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        raise Malformed(explain(model.__name__, error)) from error


def lease_body(groups: Sequence[bytes], why_waiting: str, *, leased: Sequence[str] = ()) -> bytes:
    """A `LeaseAnswer` from groups that are JSON already: stored bytes are not parsed again."""
    answer = LeaseAnswer(groups=(), leased=tuple(leased), why_waiting=why_waiting)
    empty = answer.model_dump_json(exclude={"groups"}).encode()
    return b'{"groups":[' + b",".join(groups) + b"]," + empty[1:]


def explain(what: str, error: ValidationError) -> str:
    faults = [_fault(fault) for fault in error.errors(include_url=False)]
    more = f" (and {len(faults) - 5} more)" if len(faults) > 5 else ""
    return f"{what}: " + "; ".join(faults[:5]) + more


def _fault(fault: Any) -> str:
    where = ".".join(str(part) for part in fault["loc"]) or "(whole message)"
    if fault["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        return f"{where}: unknown key"
    if fault["type"] == "value_error":
        return f"{where}: {fault['ctx']['error']}"
    return f"{where}: {fault['msg'][0].lower()}{fault['msg'][1:]}"
