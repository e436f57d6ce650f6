"""The engines of a run as a list, whichever way the configuration says it: so many alike, or one by one."""

from syncline.config.schema import RunConfig, Server


def servers(config: RunConfig) -> tuple[Server, ...]:
    """With `bridge.name: shared` all are on the same devices."""
    engine = config.engine
    if engine.servers:
        return engine.servers
    size = engine.tensor_parallel_size * num_stages(config)
    apart = 0 if config.bridge.name == "shared" else size
    return tuple(
        Server(devices=engine.devices[i * apart : i * apart + size], tensor_parallel_size=engine.tensor_parallel_size)
        for i in range(engine.num_replicas)
    )


def num_stages(config: RunConfig) -> int:
    """Of vLLM's pipeline parallelism, which every engine has alike: each has as many ranks as layers are cut in."""
    return int(config.engine.extra.get("pipeline_parallel_size", 1))


def all_devices(config: RunConfig) -> tuple[int, ...]:
    """GPUs of the engines that the run starts."""
    if config.engine.servers:
        return tuple(device for server in config.engine.servers for device in server.devices)
    return config.engine.devices
