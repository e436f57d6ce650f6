"""Rules of a pool of engines: who is in it, on which GPUs, and how many of them a run may lose."""

from collections import Counter
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from syncline.config.schema import Engine, RunConfig
from syncline.config.servers import num_stages, servers

_SAID_ONE_BY_ONE = ("num_replicas", "tensor_parallel_size", "devices")
OF_A_START = (
    "port",
    "gpu_memory_utilization",
    "kv_cache_bytes",
    "max_num_seqs",
    "enforce_eager",
    "num_threads",
    "max_restarts",
    "extra",
)
"""Settings that an engine gets when it is started."""


def server_rules(config: RunConfig) -> Iterator[str]:
    """Every fault, with field, value and remedy."""
    if config.engine.servers:
        yield from _listed(config)
    yield from _losses(config)


def _listed(config: RunConfig) -> Iterator[str]:
    engine = config.engine
    for field in _SAID_ONE_BY_ONE:
        if (value := getattr(engine, field)) != _default(field):
            value = list(value) if isinstance(value, tuple) else value
            yield f"engine.{field}: {value} is said twice, because engine.servers lists every engine; leave one out"
    if all(server.url for server in engine.servers):
        for field in OF_A_START:
            if (value := getattr(engine, field)) != _default(field):
                yield (
                    f"engine.{field}: {value!r} is for engines that are started, and those of engine.servers run "
                    "already and would ignore it; give it to their `syncline serve`"
                )
    if config.bridge.name == "shared":
        yield (
            "engine.servers: lists engines apart, and bridge.name = 'shared' has one copy of the weights for all; use "
            "engine.num_replicas, or set bridge.name to broadcast, lora or restart"
        )
    for i, server in enumerate(engine.servers):
        if server.url is not None:
            yield from _elsewhere(f"engine.servers.{i}", server.url, server.devices)
        elif engine.device != "cpu" and len(set(server.devices)) != server.tensor_parallel_size * num_stages(config):
            stages = f" × pipeline_parallel_size = {num_stages(config)}" if num_stages(config) > 1 else ""
            yield (
                f"engine.servers.{i}.devices: {list(server.devices)} names {len(set(server.devices))} GPUs for "
                f"tensor_parallel_size = {server.tensor_parallel_size}{stages}; name one a rank, or set engine.device "
                "to cpu"
            )
    held = Counter(device for server in engine.servers for device in set(server.devices))
    if twice := sorted(device for device, times in held.items() if times > 1):
        yield f"engine.servers: GPU {twice[0]} is given to {held[twice[0]]} engines; give each its own"
    urls = Counter(server.url for server in engine.servers if server.url)
    if again := [url for url, times in urls.items() if times > 1]:
        yield f"engine.servers: {again[0]} is listed {urls[again[0]]} times; leave it out but once"


def _elsewhere(field: str, url: str, devices: tuple[int, ...]) -> Iterator[str]:
    parts = urlsplit(url)
    has_port = parts.netloc.rpartition(":")[2].isdigit()
    if not (parts.scheme == "http" and parts.hostname and has_port) or parts.path.strip("/"):
        yield f"{field}.url: {url!r} is no engine's address; write it as http://host:port"
    if devices:
        yield f"{field}.devices: {list(devices)} are of an engine that runs already; leave them out, or leave url out"


def _losses(config: RunConfig) -> Iterator[str]:
    least, there = config.bridge.min_engines, len(servers(config))
    if least is None:
        return
    if least > there:
        yield f"bridge.min_engines: {least} is above the {there} engines there are; lower it"
    if least < there and config.bridge.name == "shared":
        yield (
            f"bridge.min_engines: {least} lets engines go, and with bridge.name = 'shared' one that does not answer "
            "may read weights while they change; leave it out, or set bridge.name to broadcast, lora or restart"
        )


def _default(field: str) -> Any:
    return Engine.model_fields[field].get_default(call_default_factory=True)
