"""`shared`: one copy of the weights. The learner's parameters are views of the engine's, so a step changes both.

CUDA IPC on a GPU, a memory file on a CPU; nothing is copied or transferred, CUDA graphs and compilation stay on.
Because the optimizer writes what the engine reads, the engine is paused around every step: `updating` stops it at a
token boundary, the step writes in place, `publish` has both sides digest the bytes they see, and only equal digests
resume it. Several engines may sample from the one copy: the first owns it, the others were started attached to it.
Where engine and learner are split over ranks, each rank of the learner has the pieces of one rank of the engine.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from syncline.bridges.fleet import Fleet
from syncline.bridges.handles import bind, fingerprint_of, open_views
from syncline.bridges.manifest import Shard
from syncline.bridges.measure import LearnerDigests
from syncline.bridges.ranks import ONE_RANK, Ranks
from syncline.bridges.receipt import kind_of, model_digest
from syncline.bridges.stopwatch import Stopwatch
from syncline.config.schema import Bridge
from syncline.errors import SyncError
from syncline.protocols import EngineControl, Receipt, SyncReport

Shards = Callable[[Any], Iterable[tuple[str, Shard]]]


class SharedBridge:
    """See the module. `shards(model)` yields this rank's pieces under their checkpoint names, tied ones once; their
    tensors are those the model computes with, so that rebinding their `.data` rebinds the model. `device`: where a
    model that lies elsewhere is brought as it is attached, so that its own weights are never there."""

    def __init__(
        self,
        engines: Sequence[EngineControl],
        config: Bridge,
        *,
        shards: Shards,
        ranks: Ranks = ONE_RANK,
        device: torch.device | None = None,
    ) -> None:
        self._fleet = Fleet(engines, config, ranks=ranks)
        self._ranks = ranks
        self._shards = shards
        self._device = device
        self._digests = LearnerDigests(shards, ranks=ranks)
        self._paused: tuple[Stopwatch, list[Receipt]] | None = None
        """Running since the pause, and what the engines then held; `None` while they sample."""

    def attach(self, model: Any) -> None:
        """Rebinds every parameter to the owner's memory. The engines stay paused until the first publish."""
        self._fleet.wait_until_ready()
        own = dict(self._shards(model))
        self._fleet.refuse_other_model({name: kind_of(shard.tensor, shard.shape) for name, shard in own.items()})
        self._pause()
        exported, device = self._export_of_own_rank(), self._device or next(iter(own.values())).tensor.device
        theirs = self._ranks.together(lambda: open_views(exported, device=device, model=fingerprint_of(own)))
        self._ranks.together(lambda: bind(own, theirs, rank=self._ranks.rank))
        if self._device:
            model.to(self._device)  # buffers

    @contextmanager
    def updating(self) -> Iterator[None]:
        with self._fleet.paused_on_failure():
            self._pause()
            yield

    def publish(self, model: Any, *, policy_version: int) -> SyncReport:
        return self._fleet.publishing(lambda: self._publish(model, policy_version))

    def _publish(self, model: Any, policy_version: int) -> SyncReport:
        clock, served = self._pause()
        clock.lap("step")
        self._fleet.refuse_backwards(policy_version, served)
        digests = self._digests.of(model)
        expected = Receipt(policy_version, model_digest(digests))
        clock.lap("digest")
        self._fleet.adopt(expected, digests=digests)
        clock.lap("adopt")
        self._paused = None
        parts = {part: seconds for part, seconds in clock.parts.items() if part != "step"}
        return SyncReport(expected, 0, sum(parts.values()), clock.total, parts)

    def close(self) -> None:
        """The engine owns the memory; nothing else is held."""
        self._fleet.close()

    def _export_of_own_rank(self) -> Mapping[str, Any]:
        """The owner's memory as this rank shares it."""
        exports = self._ranks.from_first(lambda: self._fleet.engines[0].export())
        if len(exports) != self._ranks.world_size:
            raise SyncError(
                f"{self._fleet.engines[0].name} has {len(exports)} tensor-parallel ranks and the learner "
                f"{self._ranks.world_size}; set learner.tensor_parallel_size to engine.tensor_parallel_size, or use "
                "bridge.name restart"
            )
        return exports[self._ranks.rank]

    def _pause(self) -> tuple[Stopwatch, list[Receipt]]:
        """Once for a step, whoever comes first: `updating`, or a publish outside of it."""
        if self._paused is None:
            clock = Stopwatch()
            served = [paused.receipt for paused in self._fleet.pause()]
            clock.lap("pause")
            self._paused = clock, served
        return self._paused
