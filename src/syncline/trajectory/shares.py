"""Who gets the next permits when several environments ask: start-time fair queueing (Goyal, Vin, Cheng 1996).

Every permit advances its environment's virtual time by 1 / weight, and the environment furthest behind goes first,
so grants follow the weights over time. Only environments that ask *now* take part: one that is silent blocks nobody,
and the credit it gathers meanwhile is capped (`start_tag`), so that it cannot starve the others when it returns.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Ask:
    """A worker waiting for permits."""

    environment: str
    worker: str
    num_permits: int
    num_tasks: int | None = None
    """Of a pass over the environment's tasks; `None`: they have no end."""

    @property
    def key(self) -> tuple[str, str]:
        return (self.environment, self.worker)


def start_tag(share: float, virtual_time: float, *, weight: float, credit: int) -> float:
    """Where an environment's next permit begins: at most `credit` permits behind the one granted last."""
    return max(share, virtual_time - credit / weight)


def allot(
    asks: Sequence[Ask], tags: Mapping[str, float], *, weights: Mapping[str, float], free: int
) -> dict[tuple[str, str], int]:
    """Shares `free` permits between all asks: how many each would get, `tags` being the environments' start tags."""
    tags = dict(tags)
    given = {ask.key: 0 for ask in asks}
    for _ in range(min(free, sum(ask.num_permits for ask in asks))):
        unserved = (ask for ask in asks if given[ask.key] < ask.num_permits)
        first = min(unserved, key=lambda ask: (tags[ask.environment], given[ask.key], ask.key))
        given[first.key] += 1
        tags[first.environment] += 1 / weights[first.environment]
    return given
