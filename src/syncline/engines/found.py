"""The engine that `vllm_bridge_config.json` names: its handles come from the file, all else from the engine itself."""

from collections.abc import Mapping, Sequence
from typing import Any

from syncline.bridges.bridge_file import BridgeFile
from syncline.bridges.handles import fingerprint
from syncline.engines.client import EngineController


class FoundEngine(EngineController):
    """`EngineControl` over HTTP and the file."""

    def __init__(self, file: BridgeFile, *, timeout_seconds: float) -> None:
        super().__init__(file.url, timeout_seconds=timeout_seconds)
        self._file = file

    def export(self) -> Sequence[Mapping[str, Any]]:
        """Raises `SyncError` when the engine that answers is not the one that wrote the file."""
        origin, remedy = self._file.origin(0), "start the engine again with --bridge-config, and the learner after it"
        answering = {"vllm_version": self.health()["version"], "model": fingerprint(self.parameters())}
        for field, other in answering.items():
            if getattr(origin, field) != other:
                raise self._file.refusal(field, getattr(origin, field), f"{self.name}'s {other}", remedy)
        return self._file.handles
