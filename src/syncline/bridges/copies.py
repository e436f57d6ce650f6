"""What the bridges to engines with weights of their own have alike: a step disturbs nobody, a fault stops everybody."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from syncline.bridges.fleet import Fleet
from syncline.protocols import EngineControl, SyncReport


class CopyingBridge(ABC):
    """See the module; `_fleet` are the engines."""

    _fleet: Fleet

    @contextmanager
    def updating(self) -> Iterator[None]:
        """The engines do not read what a step writes, so they go on sampling meanwhile."""
        with self._fleet.paused_on_failure():
            yield

    def publish(self, model: Any, *, policy_version: int) -> SyncReport:
        return self._fleet.publishing(lambda: self._publish(model, policy_version), admit=self._admit)

    @abstractmethod
    def _publish(self, model: Any, policy_version: int) -> SyncReport: ...

    @abstractmethod
    def _admit(self, engine: EngineControl) -> None:
        """Of an engine that came back: raises `SyncError` when it is another than at the attach."""
