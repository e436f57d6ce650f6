"""What runs inside vLLM's workers, called by name over `collective_rpc`: once on every tensor-parallel rank.

An answer is `{"value": ...}`, or `{"fault": ...}` when this rank cannot do it: vLLM would carry an exception to the
caller without its type, or end the engine.
"""

import logging
from collections.abc import Callable
from typing import Any

from syncline.bridges.handles import export_views, move_to_memory_file
from syncline.bridges.receipt import shard_digests, whole
from syncline.engines.vllm.layout import checkpoint_views, engine_copies
from syncline.errors import SyncError


class WorkerExtension:
    """vLLM appends this class to its worker's bases (`--worker-extension-cls`), so `self` is the worker."""

    get_model: Any
    model_runner: Any
    device: Any
    _memory_file: tuple[str, int] | None = None

    def syncline_parameters(self) -> dict[str, Any]:
        """Digests (`receipt.shard_digests`) of what the next forward pass will read."""
        return _answer(lambda: shard_digests(checkpoint_views(self.get_model())))

    def syncline_reload(self, path: str) -> dict[str, Any]:
        """Loads the checkpoint at `path` into the parameters' own storages; answers as `syncline_parameters`."""
        logging.getLogger("vllm.model_executor.model_loader.reload.layerwise").setLevel(logging.ERROR)
        self.model_runner.reload_weights(weights_path=path)  # it warns of layers without weights; the digest says more
        return self.syncline_parameters()

    def syncline_share(self) -> dict[str, Any]:
        """Makes the parameters shareable: on a CPU they move, in place, into a memory file. Before anything samples."""
        return _answer(self._share)

    def syncline_export(self, fused: bool) -> dict[str, Any]:
        """Where this rank's pieces lie, under their checkpoint names, or (`fused`) as vLLM names and fuses them."""
        return _answer(lambda: self._export(fused))

    def _share(self) -> None:
        if self.device.type == "cpu":
            self._memory_file = move_to_memory_file(self.get_model().parameters())

    def _export(self, fused: bool) -> dict[str, Any]:
        model = self.get_model()
        if fused:
            named = ((name, whole(parameter)) for name, parameter in model.named_parameters())
            return export_views(named, memory_file=self._memory_file)
        if copies := engine_copies(model):
            raise SyncError(
                f"{copies[0]} is vLLM's own copy of other weights, which a step in place would leave old; use "
                "bridge.name broadcast or restart"
            )
        return export_views(checkpoint_views(model), memory_file=self._memory_file)


def _answer(call: Callable[[], Any]) -> dict[str, Any]:
    try:
        return {"value": call()}
    except SyncError as error:
        return {"fault": str(error)}
