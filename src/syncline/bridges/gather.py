"""The learner's side of a bridge when it has several ranks: every rank gathers, rank 0 alone speaks to the engines.

Gathering a parameter is a collective of the learner's ranks, so all of them walk through the same parameters at the
same time: at the attach, for the digest, and once more if bytes move. Rank 0 decides, because it alone hears the
engines; the others wait for its word (in torch's default group, under its timeout) and fail with it.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from syncline.bridges.fleet import Lost
from syncline.bridges.receipt import model_digest, parameter_digests
from syncline.bridges.stopwatch import Stopwatch
from syncline.errors import SyncError
from syncline.protocols import Receipt, SyncReport

Export = Callable[[Any], Iterable[tuple[str, torch.Tensor]]]


def gathered(named: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """Sharded parameters (FSDP's) gathered, one at a time; whole ones as they are. What a tensor-parallel learner
    exports gathers itself as it is read."""
    from torch.distributed.tensor import DTensor

    for name, tensor in named:
        yield name, tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class Others:
    """The learner's other ranks, as rank 0 sees them; none unless torch's default group says so."""

    def __init__(self) -> None:
        self._exist = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1

    @contextmanager
    def told(self) -> Iterator[dict[str, Any]]:
        """Tells them at the end how the body went, and what it put into the word."""
        word: dict[str, Any] = {}
        try:
            yield word
        except Lost:
            self.tell({"again": True})
            raise
        except BaseException as error:
            self.tell({"fault": str(error) or repr(error)})
            raise
        self.tell(word)

    def tell(self, word: dict[str, Any]) -> None:
        if self._exist:
            dist.broadcast_object_list([word], src=0)

    def gather_along(self, rest: Iterator[Any]) -> None:
        """After a fault: they are still gathering, and would wait for this rank."""
        if self._exist:
            _walk(rest)


class GatheringBridge:
    """`WeightBridge` of the ranks but the first, beside its `BroadcastBridge`."""

    def __init__(self, *, export: Export) -> None:
        self._export = export

    def attach(self, model: Any) -> None:
        _walk(self._export(model))
        _hear()

    @contextmanager
    def updating(self) -> Iterator[None]:
        yield

    def publish(self, model: Any, *, policy_version: int) -> SyncReport:
        """Raises `SyncError` with rank 0's fault."""
        while True:
            try:
                return self._publish(model, policy_version)
            except _Again:
                continue

    def _publish(self, model: Any, policy_version: int) -> SyncReport:
        clock = Stopwatch()
        digests = parameter_digests(gathered(self._export(model)))
        clock.lap("digest")
        if _hear()["moves"]:
            _walk(gathered(self._export(model)))
        _hear()
        clock.lap("gather")
        return SyncReport(Receipt(policy_version, model_digest(digests)), 0, clock.total, 0.0, dict(clock.parts))

    def close(self) -> None:
        """Nothing is held."""


def _walk(named: Iterable[Any]) -> None:
    """To the end: other ranks gather what this one has a piece of."""
    deque(named, maxlen=0)


class _Again(SyncError):
    """Rank 0 lost engines on the way and publishes to the others."""


def _hear() -> dict[str, Any]:
    """Rank 0's word. Raises `SyncError` when it is a fault."""
    heard: list[Any] = [None]
    dist.broadcast_object_list(heard, src=0)
    if heard[0].get("again"):
        raise _Again("rank 0 lost an engine")
    if heard[0].get("fault"):
        raise SyncError(f"rank 0: {heard[0]['fault']}")
    return heard[0]
