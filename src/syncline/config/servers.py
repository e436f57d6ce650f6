"""The engines of a run as a list, whichever way the configuration says it: so many alike, or one by one."""

from syncline.config.schema import RunConfig, Server


def servers(config: RunConfig) -> tuple[Server, ...]:
    """Replicas take sets of GPUs, one a rank, in turn; with `bridge.name: shared` all are on the same."""
    engine = config.engine
    if engine.servers:
        return engine.servers
    size, sets = engine.tensor_parallel_size * num_stages(config), _num_sets(config)
    own = [engine.devices[i * size : (i + 1) * size] for i in range(sets)]
    ranks = engine.tensor_parallel_size
    return tuple(Server(devices=own[i % sets], tensor_parallel_size=ranks) for i in range(engine.num_replicas))


def engines_on_a_gpu(config: RunConfig) -> int:
    """The most that start on one; engines of a list have GPUs of their own."""
    return 1 if config.engine.servers else -(-config.engine.num_replicas // _num_sets(config))


def _num_sets(config: RunConfig) -> int:
    size = config.engine.tensor_parallel_size * num_stages(config)
    return 1 if config.bridge.name == "shared" else max(1, len(config.engine.devices) // size)


def num_stages(config: RunConfig) -> int:
    """Of vLLM's pipeline parallelism, which every engine has alike: each has as many ranks as layers are cut in."""
    return int(config.engine.extra.get("pipeline_parallel_size", 1))


def all_devices(config: RunConfig) -> tuple[int, ...]:
    """GPUs of the engines that the run starts."""
    if config.engine.servers:
        return tuple(device for server in config.engine.servers for device in server.devices)
    return config.engine.devices
