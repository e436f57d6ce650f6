"""What runs inside vLLM's workers, called by name over `collective_rpc`."""

from typing import Any

from syncline.bridges.receipt import parameter_digests
from syncline.engines.vllm.layout import checkpoint_views


class WorkerExtension:
    """vLLM appends this class to its worker's bases (`--worker-extension-cls`), so `self` is the worker."""

    get_model: Any
    model_runner: Any

    def syncline_parameters(self) -> dict[str, str]:
        """Checkpoint name → dtype, shape and digest of what the next forward pass will read."""
        return parameter_digests(checkpoint_views(self.get_model()))

    def syncline_reload(self, path: str) -> dict[str, str]:
        """Loads the checkpoint at `path` into the parameters' own storages; answers as `syncline_parameters`."""
        self.model_runner.reload_weights(weights_path=path)
        return self.syncline_parameters()
