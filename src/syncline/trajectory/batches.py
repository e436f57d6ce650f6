"""Which queued groups make a batch of a number of sequences. Pure.

A batch is exactly as large as asked whenever some choice of whole groups is, which is so for all sizes that divide one
another and the batch. Otherwise it is the largest that fits: less than asked, never more and never nothing, because
waiting for sizes that nobody sends would be waiting for ever.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Candidate:
    """A queued group: whose, and of how many sequences."""

    environment: str
    size: int


def choose(
    candidates: Sequence[Candidate], batch_size: int, *, minima: Mapping[str, int], with_oldest: bool = False
) -> list[int]:
    """Indices into `candidates` (oldest first), in their order; of their sequences, `minima` by environment come first.

    Among choices of the same size the one with the oldest groups; `with_oldest` takes the first in any case, which
    keeps a size that seldom fits from waiting for ever.
    """
    chosen = [0] if with_oldest else []
    room = batch_size - sum(candidates[i].size for i in chosen)
    for environment, minimum in minima.items():
        taken = 0
        for i, candidate in enumerate(candidates):
            if i in chosen:
                continue
            if candidate.environment == environment and taken < minimum and candidate.size <= room:
                chosen.append(i)
                taken += candidate.size
                room -= candidate.size
    rest = [i for i in range(len(candidates)) if i not in set(chosen)]
    return sorted(chosen + [rest[i] for i in fill([candidates[i].size for i in rest], room)])


def fill(sizes: Sequence[int], room: int) -> list[int]:
    """The first indices whose sizes add up to `room`, or to the most below it.

    `reachable[i]` has bit s set when some of `sizes[i:]` add up to s: the subset-sum table, a bit a cell.
    """
    within = (1 << room + 1) - 1
    reachable = [1]
    for size in reversed(sizes):
        reachable.append((reachable[-1] | reachable[-1] << size) & within if size <= room else reachable[-1])
    reachable.reverse()
    missing = reachable[0].bit_length() - 1
    indices: list[int] = []
    for i, size in enumerate(sizes):
        if size <= missing and reachable[i + 1] >> missing - size & 1:
            indices.append(i)
            missing -= size
    return indices


def sequences_promised(fractions: Mapping[str, float], batch_size: int) -> dict[str, int]:
    """Sequences of each environment in a batch, by its `min_batch_allocation`; scaled down when they ask for more than
    there is."""
    asked = sum(fractions.values())
    return {name: int(batch_size * fraction / max(1.0, asked)) for name, fraction in fractions.items()}
