"""`shared`: one copy of the weights. The learner's parameters are views of the engine's, so a step changes both.

CUDA IPC on a GPU, a memory file on a CPU; nothing is copied or transferred, CUDA graphs and compilation stay on.
Because the optimizer writes what the engine reads, the engine is paused around every step: `updating` stops it at a
request's end, the step writes in place, `publish` has both sides digest the bytes they see, and only equal digests
resume it.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from syncline.bridges.handles import open_views
from syncline.bridges.proof import paused_on_failure, prove, refuse_backwards, refuse_other_model
from syncline.bridges.receipt import kind_of, model_digest, parameter_digests
from syncline.bridges.stopwatch import Stopwatch
from syncline.config.schema import Bridge
from syncline.errors import SyncError
from syncline.protocols import EngineControl, Receipt, SyncReport

Parameters = Callable[[Any], Iterable[tuple[str, torch.nn.Parameter]]]


class SharedBridge:
    """See the module. `parameters(model)` yields the parameters under their checkpoint names, tied ones once."""

    def __init__(self, engine: EngineControl, config: Bridge, *, parameters: Parameters) -> None:
        self._engine = engine
        self._config = config
        self._parameters = parameters
        self._paused: Stopwatch | None = None
        """Running since the pause; `None` while the engine samples."""

    def attach(self, model: Any) -> None:
        """Rebinds every parameter to the engine's memory. The engine stays paused until the first publish."""
        self._engine.wait_until_ready(timeout_seconds=self._config.timeout_seconds)
        own = dict(self._parameters(model))
        refuse_other_model(self._engine, {name: kind_of(parameter) for name, parameter in own.items()})
        self._pause()
        device = next(iter(own.values())).device
        theirs = open_views(self._only_rank(), device=device)
        for name, parameter in own.items():
            parameter.data = theirs[name].tensor

    @contextmanager
    def updating(self) -> Iterator[None]:
        with paused_on_failure(self._engine, timeout_seconds=self._config.timeout_seconds):
            self._pause()
            yield

    def publish(self, model: Any, *, policy_version: int) -> SyncReport:
        with paused_on_failure(self._engine, timeout_seconds=self._config.timeout_seconds):
            refuse_backwards(self._engine, self._engine.receipt(), policy_version=policy_version)
            clock = self._pause()
            clock.lap("step")
            digests = parameter_digests(self._parameters(model))
            expected = Receipt(policy_version, model_digest(digests))
            clock.lap("digest")
            prove(self._engine, self._engine.adopt(policy_version=policy_version), expected, digests=digests)
            clock.lap("adopt")
            self._engine.resume()
            clock.lap("resume")
        self._paused = None
        parts = {part: seconds for part, seconds in clock.parts.items() if part != "step"}
        return SyncReport(expected, 0, sum(parts.values()), clock.total, parts)

    def close(self) -> None:
        """The engine owns the memory; nothing is held."""

    def _only_rank(self) -> Mapping[str, Any]:
        exports = self._engine.export()
        if len(exports) != 1:
            raise SyncError(
                f"engine {self._engine.name} has {len(exports)} tensor-parallel ranks, each with pieces of the "
                "parameters, and this learner holds whole ones; set engine.tensor_parallel_size to 1, or use "
                "bridge.name restart"
            )
        return exports[0]

    def _pause(self) -> Stopwatch:
        """Once for a step, whoever comes first: `updating`, or a publish outside of it."""
        if self._paused is None:
            clock = Stopwatch()
            self._engine.pause(mode=self._config.in_flight, timeout_seconds=self._config.timeout_seconds)
            clock.lap("pause")
            self._paused = clock
        return self._paused
