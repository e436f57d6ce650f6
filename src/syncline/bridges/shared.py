"""`shared`: one copy of the weights. The learner's parameters are views of the engine's, so a step changes both.

CUDA IPC on a GPU, a memory file on a CPU; nothing is copied or transferred, CUDA graphs and compilation stay on.
Because the optimizer writes what the engine reads, the engine is paused around every step: `updating` stops it at a
token boundary, the step writes in place, `publish` has both sides digest the bytes they see, and only equal digests
resume it. Several engines may sample from the one copy: the first owns it, the others were started attached to it.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from syncline.bridges.fleet import Fleet
from syncline.bridges.handles import bind, open_views
from syncline.bridges.receipt import kind_of, model_digest, parameter_digests
from syncline.bridges.stopwatch import Stopwatch
from syncline.config.schema import Bridge
from syncline.protocols import EngineControl, Receipt, SyncReport

Parameters = Callable[[Any], Iterable[tuple[str, torch.nn.Parameter]]]


class SharedBridge:
    """See the module. `parameters(model)` yields the parameters under their checkpoint names, tied ones once."""

    def __init__(self, engines: Sequence[EngineControl], config: Bridge, *, parameters: Parameters) -> None:
        self._fleet = Fleet(engines, timeout_seconds=config.timeout_seconds)
        self._in_flight = config.in_flight
        self._parameters = parameters
        self._paused: Stopwatch | None = None
        """Running since the pause; `None` while the engines sample."""

    def attach(self, model: Any) -> None:
        """Rebinds every parameter to the owner's memory. The engines stay paused until the first publish."""
        self._fleet.wait_until_ready()
        own = dict(self._parameters(model))
        self._fleet.refuse_other_model({name: kind_of(parameter) for name, parameter in own.items()})
        self._pause()
        device = next(iter(own.values())).device
        bind(own, open_views(self._fleet.engines[0].export(), device=device))

    @contextmanager
    def updating(self) -> Iterator[None]:
        with self._fleet.paused_on_failure():
            self._pause()
            yield

    def publish(self, model: Any, *, policy_version: int) -> SyncReport:
        with self._fleet.paused_on_failure():
            self._fleet.refuse_backwards(policy_version)
            clock = self._pause()
            clock.lap("step")
            digests = parameter_digests(self._parameters(model))
            expected = Receipt(policy_version, model_digest(digests))
            clock.lap("digest")
            self._fleet.prove(self._fleet.adopt(policy_version), expected, digests=digests)
            clock.lap("adopt")
            self._fleet.resume()
            clock.lap("resume")
        self._paused = None
        parts = {part: seconds for part, seconds in clock.parts.items() if part != "step"}
        return SyncReport(expected, 0, sum(parts.values()), clock.total, parts)

    def close(self) -> None:
        """The engine owns the memory; nothing else is held."""
        self._fleet.close()

    def _pause(self) -> Stopwatch:
        """Once for a step, whoever comes first: `updating`, or a publish outside of it."""
        if self._paused is None:
            clock = Stopwatch()
            self._fleet.pause(self._in_flight)
            clock.lap("pause")
            self._paused = clock
        return self._paused
