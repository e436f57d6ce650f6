"""What runs inside vLLM's workers, called by name over `collective_rpc`: once on every tensor-parallel rank."""

import logging
from collections.abc import Iterable
from typing import Any

from syncline.bridges.handles import export_views
from syncline.bridges.invitation import Invitation
from syncline.bridges.manifest import Shard
from syncline.bridges.measure import Measure
from syncline.engines.vllm import compat
from syncline.engines.vllm.adapter_extension import AdapterExtension
from syncline.engines.vllm.answer import answer
from syncline.engines.vllm.layout import checkpoint_views, refuse_copies
from syncline.engines.vllm.packed_experts import handed_to
from syncline.engines.vllm.receiver import Member
from syncline.errors import SyncError


class WorkerExtension(AdapterExtension):
    """vLLM appends this class to its worker's bases (`--worker-extension-cls`), so `self` is the worker."""

    get_model: Any
    rank: int
    _measure: Measure | None = None
    _broadcast: Member | None = None

    def syncline_measure(self) -> dict[str, Any]:
        """What the next forward pass will read: a `measure.Reading` of this rank's pieces."""
        return answer(lambda: self._own_measure().read(self.get_model()))

    def syncline_pieces(self) -> dict[str, Any]:
        """The `receipt.Piece`s that were measured last."""
        return answer(lambda: self._own_measure().pieces)

    def syncline_handed(self) -> dict[str, Any]:
        """`packed_experts.handed_to` this rank's model."""
        return {"value": handed_to(self.get_model())}

    def syncline_stage_inputs(self) -> dict[str, Any]:
        """`compat.make_stage_inputs`, before anything samples."""
        return answer(lambda: compat.make_stage_inputs(self.model_runner))

    def syncline_reload(self, path: str) -> dict[str, Any]:
        """Loads the checkpoint at `path` into the parameters' own storages; answers as `syncline_measure`."""
        logging.getLogger("vllm.model_executor.model_loader.reload.layerwise").setLevel(logging.ERROR)
        self.model_runner.reload_weights(weights_path=path)  # it warns of layers without weights; the digest says more
        return self.syncline_measure()

    def syncline_export(self) -> dict[str, Any]:
        """Where this rank's pieces lie, under their checkpoint names."""
        version, memory_file = compat.vllm_version(), getattr(self.get_model(), "syncline_memory_file", None)
        return answer(lambda: export_views(self._views(), memory_file=memory_file, vllm_version=version))

    def _own_measure(self) -> Measure:
        self._measure = self._measure or Measure(checkpoint_views)
        return self._measure

    def _views(self) -> Iterable[tuple[str, Shard]]:
        refuse_copies(self.get_model())
        return checkpoint_views(self.get_model())

    def syncline_join(self, invitation: dict[str, Any], first_rank: int, timeout_seconds: float) -> dict[str, Any]:
        """Leaves the group of an earlier learner and joins this one's. Answers with the digest of the plan."""
        self.syncline_leave()
        member = Member(Invitation.from_wire(invitation), rank=first_rank + self.rank, device=self.device)
        self._broadcast = member
        return answer(lambda: member.join(self._views(), timeout_seconds=timeout_seconds))

    def syncline_receive(self, generation: str, timeout_seconds: float) -> dict[str, Any]:
        """Takes one version from the learner's group."""
        return answer(lambda: self._member().receive(generation, timeout_seconds=timeout_seconds))

    def syncline_leave(self) -> dict[str, Any]:
        """Whoever still sends to this worker, or receives from it, then knows that it will not go on."""
        if self._broadcast is not None:
            self._broadcast.leave()
        return {"value": None}

    def _member(self) -> Member:
        if self._broadcast is None:
            raise SyncError("this worker is in no learner's group")
        return self._broadcast
