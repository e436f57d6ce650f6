"""The engines of a run as a list, whichever way the configuration says it: so many alike, or one by one."""

from syncline.config.schema import RunConfig, Server


def servers(config: RunConfig) -> tuple[Server, ...]:
    """With `bridge.name: shared` all are on the same devices."""
    engine = config.engine
    if engine.servers:
        return engine.servers
    size = 0 if config.bridge.name == "shared" else engine.tensor_parallel_size
    width = len(engine.devices) if config.bridge.name == "shared" else engine.tensor_parallel_size
    return tuple(
        Server(devices=engine.devices[i * size : i * size + width], tensor_parallel_size=engine.tensor_parallel_size)
        for i in range(engine.num_replicas)
    )


def all_devices(config: RunConfig) -> tuple[int, ...]:
    """GPUs of the engines that the run starts."""
    if config.engine.servers:
        return tuple(device for server in config.engine.servers for device in server.devices)
    return config.engine.devices
