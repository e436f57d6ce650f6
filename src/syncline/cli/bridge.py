"""The bridge a configuration names, joined to the learner's side of it."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from syncline.config import RunConfig
from syncline.config.rules import serves_adapters

if TYPE_CHECKING:
    from torch import Tensor

    from syncline.bridges.ranks import Ranks
    from syncline.protocols import EngineControl, WeightBridge


def build_bridge(
    config: RunConfig, engines: Sequence["EngineControl"], assets: Path, *, ranks: "Ranks"
) -> "WeightBridge":
    from syncline.bridges.broadcast import BroadcastBridge
    from syncline.bridges.gather import GatheringBridge
    from syncline.bridges.lora import LoraBridge
    from syncline.bridges.restart import RestartBridge
    from syncline.bridges.shared import SharedBridge
    from syncline.learner.adapter import adapter_layers, base_parameters
    from syncline.learner.model import checkpoint_shards, saved_parameters
    from syncline.learner.places import wholes

    def export(model: Any) -> Iterable[tuple[str, "Tensor"]]:
        return wholes(checkpoint_shards(model), ranks)

    if serves_adapters(config):
        return LoraBridge(
            engines,
            config.bridge,
            base=base_parameters,
            layers=adapter_layers,
            folder=Path(config.run.dir) / "adapters",
            shares_base=config.bridge.name == "shared",
        )
    if config.bridge.name == "shared":
        return SharedBridge(engines, config.bridge, shards=checkpoint_shards, ranks=ranks)
    if config.bridge.name == "broadcast" and not ranks.is_first:
        return GatheringBridge(export=export)
    if config.bridge.name == "broadcast":
        return BroadcastBridge(engines, config.bridge, export=export, host=config.engine.host)
    return RestartBridge(
        engines,
        config.bridge,
        export=export,
        saved=lambda model: saved_parameters(model, ranks),
        folder=Path(config.run.dir) / "weights",
        assets=assets,
        ranks=ranks,
    )
