"""`lora`: the adapter alone, hot-swapped on every engine or on none, while requests run.

    learner   pack ─▶ digest ─▶ stage on every engine ─▶ all proved? ─▶ switch every engine
    engine                      load beside the old one, digest its slot  │ new requests get the new adapter
                                                                         └ running ones end under the old one

Nothing pauses: the new adapter is loaded into a slot of its own under a name of its own, so neither the KV cache nor
running requests can mix versions, and `stage` waits only if requests still run under the version before the last. A
request's tokens are all of the version it began with. A fault before the switch leaves every engine's policy as it
was; any fault leaves every engine paused. The base never moves: it is proved once, when the bridge is attached, and
with `shares_base` the learner's base is the engine's memory, one copy for both.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from syncline.bridges.adapter import AdapterLayout, LoraLayer, is_adapter_name, listed, what_cannot_be_held
from syncline.bridges.carriers import Carrier, Way, way_to
from syncline.bridges.copies import CopyingBridge
from syncline.bridges.fleet import Fleet
from syncline.bridges.handles import bind, fingerprint_of, open_views
from syncline.bridges.ranks import ONE_RANK, Ranks
from syncline.bridges.receipt import differences, model_digest, parameter_digests, whole
from syncline.bridges.repacked import is_repacked
from syncline.bridges.stopwatch import Stopwatch
from syncline.config.schema import Bridge
from syncline.errors import SyncError
from syncline.protocols import EngineControl, Receipt, SyncReport

Base = Callable[[Any], Iterable[tuple[str, torch.Tensor]]]
Layers = Callable[[Any], Iterable[tuple[str, LoraLayer]]]
Stored = Callable[[Any], Mapping[str, str]]


class LoraBridge(CopyingBridge):
    """See the module. `base(model)` yields the frozen parameters under their checkpoint names, tied ones once;
    `layers(model)` the adapted layers; `folder` is where versions are written for engines on other hosts. With several
    ranks both yield wholes on each of them, together; rank 0 alone holds what engines read. `stored(model)` are the
    digests of what engines repack of the checkpoint, which `base` then leaves out. `device`: where a model that shares
    its base, and lies elsewhere, is brought as it is attached."""

    def __init__(
        self,
        engines: Sequence[EngineControl],
        config: Bridge,
        *,
        base: Base,
        layers: Layers,
        folder: Path,
        shares_base: bool = False,
        stored: Stored = lambda model: {},
        ranks: Ranks = ONE_RANK,
        device: torch.device | None = None,
    ) -> None:
        self._fleet = Fleet(engines, config, ranks=ranks)
        self._ranks = ranks
        self._config = config
        self._base = base
        self._layers = layers
        self._folder = folder
        self._shares_base = shares_base
        self._brought_to = device
        self._stored = stored
        self._base_digests: dict[str, str] = {}
        self._carrier: Carrier | None = None
        self._device = torch.device("cpu")
        self._last: Receipt | None = None
        """What the engines were proved to serve by the last publish, unless it failed."""
        self._ways: list[Way] = []
        """One an engine, in the order of `self._fleet.all`."""

    def attach(self, model: Any) -> None:
        """Proves the base, refuses modules an engine cannot adapt, by name, and opens the way to every engine."""
        self._fleet.wait_until_ready()
        base = ((name, p if self._brought_to is None else p.to(self._brought_to)) for name, p in self._base(model))
        self._base_digests = parameter_digests(base) | dict(self._stored(model))
        self._fleet.each(self._refuse_other_base)
        if self._shares_base:
            self._share(model)
        layers = dict(self._layers(model))
        engines = self._fleet.each(lambda engine: engine.adapters())
        layout = self._refuse_unheld(layers, engines)
        self._device = next(iter(layers.values())).a.device
        self._ways = self._ranks.from_first(lambda: self._ways_to(engines))
        own = self._ways if self._ranks.is_first else []
        self._carrier = Carrier(layout, own, device=self._device, folder=self._folder)

    def close(self) -> None:
        if self._carrier is not None:
            self._carrier.close()
        self._fleet.close()

    def _publish(self, model: Any, policy_version: int) -> SyncReport:
        if self._carrier is None:
            raise SyncError("the bridge was not attached to a model")
        clock, layout, packed = Stopwatch(), self._carrier.layout, self._carrier.packed
        packed.pack(dict(self._layers(model)))
        clock.lap("pack")
        adapter = packed.digests()
        digests = self._base_digests | adapter
        expected = Receipt(policy_version, model_digest(digests))
        clock.lap("digest")
        changed = self._is_news(expected)
        clock.lap("ask")
        if changed:
            self._stage(adapter, self._carrier, policy_version=policy_version)
        clock.lap("stage")
        pause_seconds = self._switch(expected, digests)
        clock.lap("switch")
        moved, self._last = layout.num_bytes if changed else 0, expected
        return SyncReport(expected, moved, clock.total, pause_seconds, dict(clock.parts))

    def _is_news(self, expected: Receipt) -> bool:
        """Whether an engine lacks the adapter: asked where the last publish does not tell. Raises `SyncError` for a
        version older than what is served."""
        last, self._last = self._last, None
        if last is None or last.digest == expected.digest:
            served = self._fleet.receipts()
        else:
            served = [last] * len(self._fleet.engines)
        self._fleet.refuse_backwards(expected.policy_version, served)
        return any(receipt.digest != expected.digest for receipt in served)

    def _stage(self, adapter: Mapping[str, str], carrier: Carrier, *, policy_version: int) -> None:
        """Every engine holds the new adapter beside the old one, and has proved it."""
        sent = self._ranks.from_first(lambda: carrier.send(policy_version))
        sources = dict(zip(self._fleet.all, sent, strict=True))
        timeout = self._config.timeout_seconds

        def stage(engine: EngineControl) -> None:
            wanted = {"layout": carrier.layout.text, "source": sources[engine]}
            held = engine.stage(wanted, policy_version=policy_version, timeout_seconds=timeout)
            if faults := differences(adapter, held):
                lines = "\n".join(faults)
                raise SyncError(f"{engine.name} loaded another adapter for version {policy_version}:\n{lines}")

        self._fleet.each(stage)

    def _switch(self, expected: Receipt, digests: Mapping[str, str]) -> float:
        """Every engine samples from the staged adapter. Returns the seconds for which none sampled."""
        clock = Stopwatch()
        if self._config.in_flight == "abort":
            self._fleet.pause()
            clock.lap("pause")
        switched = self._fleet.each(lambda engine: engine.switch(expected, resume=self._fleet.is_one))
        self._fleet.proved(switched, expected, digests=digests)
        clock.lap("resume")
        return clock.total if "pause" in clock.parts else 0.0

    def _ways_to(self, engines: Sequence[Mapping[str, Any]]) -> list[Way]:
        asked = self._config.adapter_transfer
        if asked == "files":
            return ["files"] * len(engines)
        ways: list[Way] = [way_to(engine["whereabouts"], self._device) for engine in engines]
        if asked == "memory" and "files" in ways:
            raise SyncError(
                f"{self._fleet.engines[ways.index('files')].name} shares no memory with the learner: it is on "
                "another host, in another container or has another torch; set bridge.adapter_transfer to auto or files"
            )
        return ways

    def _admit(self, engine: EngineControl) -> None:
        """Raises `SyncError` unless it came back as it was: the base, and the way the adapter reaches it."""
        self._refuse_other_base(engine)
        way, held = self._ways[self._fleet.all.index(engine)], engine.adapters()
        if way != "files" and way_to(held["whereabouts"], self._device) != way:
            raise SyncError(f"{engine.name} came back elsewhere, where the learner's memory does not reach")

    def _refuse_other_base(self, engine: EngineControl) -> None:
        served = {name: digest for name, digest in engine.parameters().items() if not is_adapter_name(name)}
        for name in filter(is_repacked, served):
            self._base_digests.setdefault(name, served[name])
        if faults := differences(self._base_digests, served):
            lines = "\n".join(faults)
            raise SyncError(f"{engine.name} serves another base than the learner adapts:\n{lines}")

    def _share(self, model: Any) -> None:
        """The learner's base becomes the first engine's memory, which the others have too."""
        engine = self._fleet.engines[0]
        memory, *others = engine.export()
        if others:
            raise SyncError(
                f"{engine.name} splits the base over {len(others) + 1} ranks, and the learner's is whole; set "
                "bridge.name to lora"
            )
        own = {name: whole(p) for name, p in self._base(model)}
        device = self._brought_to or next(iter(own.values())).tensor.device
        bind(own, open_views(memory, device=device, model=fingerprint_of(own)), rank=0)
        if self._brought_to:
            model.to(device)  # the adapter, and buffers

    def _refuse_unheld(self, layers: Mapping[str, LoraLayer], engines: Sequence[Mapping[str, Any]]) -> AdapterLayout:
        layout = AdapterLayout.of(layers, engines[0]["dtype"])
        for engine, held in zip(self._fleet.engines, engines, strict=True):
            faults = what_cannot_be_held(layout.shapes, held)
            if held["dtype"] != engines[0]["dtype"]:
                faults.append(f"its adapters are {held['dtype']}, those of {self._fleet.engines[0].name} are not")
            if faults:
                raise SyncError(
                    f"{engine.name} cannot hold the learner's adapter; leave out what it names, or set "
                    f"bridge.name to restart, which merges the adapter:\n{listed(faults)}"
                )
        return layout
