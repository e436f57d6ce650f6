"""What runs inside vLLM's workers, called by name over `collective_rpc`."""

import logging
from typing import Any

from syncline.bridges.handles import export_views, move_to_memory_file
from syncline.bridges.invitation import Invitation
from syncline.bridges.manifest import Shard
from syncline.bridges.receipt import parameter_digests
from syncline.engines.vllm.layout import checkpoint_views
from syncline.engines.vllm.receiver import Member


class WorkerExtension:
    """vLLM appends this class to its worker's bases (`--worker-extension-cls`), so `self` is the worker."""

    get_model: Any
    model_runner: Any
    device: Any
    rank: int
    _memory_file: tuple[str, int] | None = None
    _broadcast: Member | None = None

    def syncline_parameters(self) -> dict[str, str]:
        """Checkpoint name → dtype, shape and digest of what the next forward pass will read."""
        return parameter_digests(checkpoint_views(self.get_model()))

    def syncline_reload(self, path: str) -> dict[str, str]:
        """Loads the checkpoint at `path` into the parameters' own storages; answers as `syncline_parameters`."""
        logging.getLogger("vllm.model_executor.model_loader.reload.layerwise").setLevel(logging.ERROR)
        self.model_runner.reload_weights(weights_path=path)  # it warns of layers without weights; the digest says more
        return self.syncline_parameters()

    def syncline_share(self) -> None:
        """Makes the parameters shareable: on a CPU they move, in place, into a memory file. Before anything samples."""
        if self.device.type == "cpu":
            self._memory_file = move_to_memory_file(self.get_model().parameters())

    def syncline_export(self, fused: bool) -> dict[str, Any]:
        """Where each parameter lies, under its checkpoint name, or (`fused`) as vLLM names and fuses them."""
        model = self.get_model()
        views = {name: p.data for name, p in model.named_parameters()} if fused else dict(checkpoint_views(model))
        return export_views(views, memory_file=self._memory_file)

    def syncline_join(self, invitation: dict[str, Any], first_rank: int, timeout_seconds: float) -> dict[str, str]:
        """Leaves the group of an earlier learner and joins this one's: `plan`, its digest, or the `fault`."""
        self.syncline_leave()
        self._broadcast = Member(Invitation.from_wire(invitation), rank=first_rank + self.rank, device=self.device)
        return self._broadcast.join(self._shards(), timeout_seconds=timeout_seconds)

    def syncline_receive(self, generation: str, timeout_seconds: float) -> dict[str, str]:
        """Takes one version from the learner's group: nothing, or the `fault`."""
        if self._broadcast is None:
            return {"fault": "this worker is in no learner's group"}
        return self._broadcast.receive(generation, timeout_seconds=timeout_seconds)

    def syncline_leave(self) -> None:
        """Whoever still sends to this worker, or receives from it, then knows that it will not go on."""
        if self._broadcast is not None:
            self._broadcast.leave()

    def _shards(self) -> dict[str, Shard]:
        views = checkpoint_views(self.get_model())
        return {name: Shard(view, tuple(view.shape), (0,) * view.dim()) for name, view in views}
