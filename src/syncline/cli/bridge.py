"""The bridge a configuration names, joined to the learner's side of it."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from syncline.config import RunConfig
from syncline.config.model_folder import packed_faults, quantisation
from syncline.config.rules import serves_adapters
from syncline.config.servers import servers
from syncline.errors import ConfigError
from syncline.launch.plan import url

if TYPE_CHECKING:
    import torch

    from syncline.bridges.ranks import Ranks
    from syncline.engines.client import EngineController
    from syncline.protocols import EngineControl, WeightBridge


def connect_engines(
    config: RunConfig, urls: Sequence[str], bridge_config: str | None, *, device: "torch.device", ranks: "Ranks"
) -> list["EngineController"]:
    """The engine that a bridge file names, if one is asked for, then those at `urls`. Nobody is spoken to yet. What
    is asked of them, once they are up, has `bridge.timeout_seconds`."""
    from syncline.bridges.bridge_file import find_bridge_file
    from syncline.engines.client import EngineController
    from syncline.engines.found import FoundEngine

    patience, timeout = config.engine.start_timeout_seconds, config.bridge.timeout_seconds
    found: list[EngineController] = []
    if bridge_config:
        if config.bridge.name != "shared":
            raise ConfigError([f"bridge.name: {config.bridge.name!r} takes no --bridge-config; set it to shared"])
        file = ranks.together(
            lambda: find_bridge_file(
                bridge_config, model=config.model.path, device=device, rank=ranks.rank, patience_seconds=patience
            )
        )
        found = [FoundEngine(file, timeout_seconds=timeout)]
    urls = urls or ([] if found else known_urls(config))
    return [*found, *(EngineController(url, timeout_seconds=timeout) for url in urls)]


def known_urls(config: RunConfig) -> list[str]:
    """Where the engines listen. Raises `ConfigError` where the file leaves the port to each start."""
    found = [
        server.url or (url(config.engine.host, config.engine.port + i) if config.engine.port else "")
        for i, server in enumerate(servers(config))
    ]
    if not all(found):
        raise ConfigError(
            ["engine.port: 0 is another port at each start; set it for servers and learner alike, or give --engine-url"]
        )
    return found


def await_servers(config: RunConfig, engines: Sequence["EngineController"]) -> None:
    """Until every one answers, all at once. Raises `EngineTimeout` naming those that do not in time."""
    from concurrent.futures import ThreadPoolExecutor

    from syncline.errors import EngineError, EngineTimeout

    def fault_of(engine: "EngineController") -> str | None:
        try:
            engine.wait_until_ready(timeout_seconds=config.engine.start_timeout_seconds)
        except EngineError as fault:
            return str(fault)
        return None

    with ThreadPoolExecutor(len(engines)) as threads:
        faults = [fault for fault in threads.map(fault_of, engines) if fault]
    if faults:
        remedy = "start it with `syncline serve`, or raise engine.start_timeout_seconds"
        raise EngineTimeout("\n".join([*faults, remedy]))


def brings_weights(config: RunConfig, ranks: "Ranks") -> bool:
    """Whether the bridge binds the learner's weights to an engine's memory before anything is computed, so that they
    need not be on its GPU at first, beside the engine's. Pieces of several ranks stay where they were split, and a
    packed base is another than the engine's."""
    return config.bridge.name == "shared" and ranks.world_size == 1 and quantisation(config.model.path) is None


def build_bridge(
    config: RunConfig,
    engines: Sequence["EngineControl"],
    assets: Path,
    *,
    ranks: "Ranks",
    device: "torch.device | None" = None,
) -> "WeightBridge":
    """`device`: where the bridge brings the model it is attached to, if it `brings_weights`."""
    from syncline.bridges.broadcast import BroadcastBridge
    from syncline.bridges.gather import GatheringBridge
    from syncline.bridges.lora import LoraBridge
    from syncline.bridges.restart import RestartBridge
    from syncline.bridges.shared import SharedBridge
    from syncline.learner.adapter import AdapterLayers, frozen_base
    from syncline.learner.model import checkpoint_shards, checkpoint_wholes, saved_parameters

    def export(model: Any) -> Iterable[tuple[str, "torch.Tensor"]]:
        return checkpoint_wholes(model, ranks)

    if faults := packed_faults(
        config.model_copy(update={"model": config.model.model_copy(update={"path": str(assets)})})
    ):
        raise ConfigError(faults)
    if serves_adapters(config):
        base, stored = frozen_base(assets)
        return LoraBridge(
            engines,
            config.bridge,
            base=base,
            stored=stored,
            layers=AdapterLayers(),
            folder=Path(config.run.dir) / "adapters",
            shares_base=config.bridge.name == "shared",
            ranks=ranks,
            device=device,
        )
    if config.bridge.name == "shared":
        return SharedBridge(engines, config.bridge, shards=checkpoint_shards, ranks=ranks, device=device)
    if config.bridge.name == "broadcast" and not ranks.is_first:
        return GatheringBridge(export=export)
    if config.bridge.name == "broadcast":
        return BroadcastBridge(engines, config.bridge, export=export, host=config.bridge.host or config.engine.host)
    return RestartBridge(
        engines,
        config.bridge,
        export=export,
        saved=lambda model: saved_parameters(model, ranks),
        folder=Path(config.run.dir) / "weights",
        assets=assets,
        ranks=ranks,
    )
