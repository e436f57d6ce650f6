"""Rules between fields: each finds a fault and says field, value and remedy. All are reported together."""

from collections.abc import Iterator

from syncline.config.engine_options import engine_options
from syncline.config.schema import RunConfig
from syncline.config.server_rules import server_rules
from syncline.config.servers import all_devices, engines_on_a_gpu, num_stages, servers

MAX_PORT = 65535
LOOPBACK = ("127.0.0.1", "localhost", "::1")
ENGINE_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM's slots may hold; a smaller adapter's slot is filled up with zeros."""
_NOT_LINEAR = ("lm_head", "embed_tokens")


def serves_adapters(config: RunConfig) -> bool:
    """The engine keeps the base and holds adapters beside it; otherwise an adapter reaches it merged."""
    return config.model.lora is not None and config.bridge.name in ("lora", "shared")


def broken_rules(config: RunConfig) -> list[str]:
    """Every cross-field fault of a config whose fields are each valid; an empty list when there is none."""
    return [fault for rule in _RULES for fault in rule(config)]


def _lengths(config: RunConfig) -> Iterator[str]:
    if config.sampling.max_tokens >= config.model.max_length:
        yield (
            f"sampling.max_tokens: {config.sampling.max_tokens} leaves no room for a prompt in "
            f"model.max_length = {config.model.max_length}; lower the one or raise the other"
        )
    if config.learner.token_budget < config.model.max_length:
        yield (
            f"learner.token_budget: {config.learner.token_budget} cannot hold one sequence of "
            f"model.max_length = {config.model.max_length}; a micro-batch never splits a sequence, so raise it"
        )
    if config.parity.max_tokens >= config.model.max_length:
        yield (
            f"parity.max_tokens: {config.parity.max_tokens} leaves no room for a prompt in "
            f"model.max_length = {config.model.max_length}; lower it"
        )


def _distribution(config: RunConfig) -> Iterator[str]:
    """The learner scores the whole vocabulary, so the sampler has to draw from it."""
    if config.sampling.top_p != 1.0:
        yield f"sampling.top_p: {config.sampling.top_p} cuts the distribution the learner scores; set it to 1.0"
    if config.sampling.top_k != 0:
        yield f"sampling.top_k: {config.sampling.top_k} cuts the distribution the learner scores; set it to 0"


def _loss(config: RunConfig) -> Iterator[str]:
    loss = config.learner.loss
    if loss.importance.clip_min >= loss.importance.clip_max:
        yield (
            f"learner.loss.importance.clip_min: {loss.importance.clip_min} is not below "
            f"clip_max = {loss.importance.clip_max}; lower it"
        )
    mask = loss.importance.sequence_mask
    if mask and mask.clip_min >= mask.clip_max:
        yield (
            f"learner.loss.importance.sequence_mask.clip_min: {mask.clip_min} is not below clip_max = {mask.clip_max}; "
            "lower it"
        )
    if mask and (mask.level, "mask") == (loss.importance.level, loss.importance.mode):
        yield (
            f"learner.loss.importance.sequence_mask.level: {mask.level!r} masks what learner.loss.importance.level and "
            "mode mask already; set level to token, or leave sequence_mask out"
        )
    if loss.old_logprobs == "sampler" and loss.importance.level != "none":
        yield (
            f"learner.loss.importance.level: {loss.importance.level!r} would correct twice, because "
            "learner.loss.old_logprobs = 'sampler' already divides by the sampler's probabilities; set it to none"
        )
    if loss.importance.level == "none" and loss.old_logprobs == "learner":
        yield from _uncorrected(config)


def _uncorrected(config: RunConfig) -> Iterator[str]:
    age = config.bridge.interval * (config.run.max_staleness + 1) - 1
    if age:
        yield (
            f"learner.loss.importance.level: 'none' trains on tokens up to {age} steps old as if they were new "
            f"(run.max_staleness = {config.run.max_staleness}, bridge.interval = {config.bridge.interval}); set it to "
            "token, or learner.loss.old_logprobs to sampler"
        )


def _schedule(config: RunConfig) -> Iterator[str]:
    optimizer = config.learner.optimizer
    if optimizer.num_warmup_steps >= config.run.num_steps:
        yield (
            f"learner.optimizer.num_warmup_steps: {optimizer.num_warmup_steps} is not below "
            f"run.num_steps = {config.run.num_steps}; lower it"
        )
    if optimizer.min_learning_rate > optimizer.learning_rate:
        yield (
            f"learner.optimizer.min_learning_rate: {optimizer.min_learning_rate} is above "
            f"learning_rate = {optimizer.learning_rate}; lower it"
        )


def _memory(config: RunConfig) -> Iterator[str]:
    learner, optimizer = config.learner, config.learner.optimizer
    if optimizer.moments == "int8" and learner.tensor_parallel_size > 1:
        yield (
            f"learner.optimizer.moments: 'int8' shares scales within a rank's piece, and tensor_parallel_size = "
            f"{learner.tensor_parallel_size} resumes on any number of ranks; set it to float32"
        )
    if learner.compile == "on" and learner.tensor_parallel_size > 1:
        yield (
            f"learner.compile: 'on' does not know split layers, and tensor_parallel_size = "
            f"{learner.tensor_parallel_size}; set it to auto"
        )
    if learner.compile == "on" and config.run.deterministic:
        yield (
            "learner.compile: 'on' fits sums to the first batch that a process sees, which a resumed one sees another "
            "of, and run.deterministic = true promises the same bits; set it to auto"
        )
    if not optimizer.in_backward:
        return
    if optimizer.max_grad_norm is not None:
        yield (
            f"learner.optimizer.in_backward: true steps a parameter before the norm of all gradients is known, which "
            f"max_grad_norm = {optimizer.max_grad_norm:g} clips; set max_grad_norm to null, or in_backward to false"
        )
    if learner.tensor_parallel_size > 1:
        yield (
            f"learner.optimizer.in_backward: true steps before ranks have added up their gradients, and "
            f"tensor_parallel_size = {learner.tensor_parallel_size}; set it to false"
        )
    if learner.data_parallel_size > 1:
        yield (
            f"learner.optimizer.in_backward: true steps while ranks still add up gradients, and data_parallel_size = "
            f"{learner.data_parallel_size}, which leaves a rank but a part of them; set it to false"
        )
    if config.bridge.name == "shared" and config.model.lora is None:
        yield (
            "learner.optimizer.in_backward: true writes weights during the backward pass, and with bridge.name = "
            "'shared' the engine reads them then; set it to false, or use restart"
        )


def _evaluation(config: RunConfig) -> Iterator[str]:
    evaluation = config.evaluation
    if evaluation.num_samples > 1 and evaluation.temperature == 0:
        yield (
            f"evaluation.num_samples: {evaluation.num_samples} attempts at temperature 0 are one and the same; set "
            "evaluation.temperature above 0, or num_samples to 1"
        )


def _environments(config: RunConfig) -> Iterator[str]:
    if not config.environments and config.evaluation.num_tasks:
        yield (
            f"evaluation.num_tasks: {config.evaluation.num_tasks} are asked of environments = [], which has none; name "
            "an environment, or set it to 0"
        )
    names = [e.name or e.task for e in config.environments]
    for i, name in enumerate(names):
        if name in names[:i]:
            yield f"environments.{i}.name: {name!r} is taken by environments.{names.index(name)}; give it another name"
    for i, overlong in enumerate(environment.overlong for environment in config.environments):
        if overlong and overlong.cache_tokens > config.sampling.max_tokens:
            yield (
                f"environments.{i}.overlong.cache_tokens: {overlong.cache_tokens} is above sampling.max_tokens = "
                f"{config.sampling.max_tokens}, so the shortest completion would be punished; lower it"
            )


def _devices(config: RunConfig) -> Iterator[str]:
    engine, learner = config.engine, config.learner
    ranks = engine.tensor_parallel_size * num_stages(config)
    wanted = ranks * (1 if config.bridge.name == "shared" else engine.num_replicas)
    named, apart = len(set(engine.devices)), config.bridge.name in ("lora", "restart")
    shared_out = apart and 0 < named == len(engine.devices) and named % ranks == wanted % named == 0
    if engine.device != "cpu" and not engine.servers and named != wanted and not shared_out:
        yield (
            f"engine.devices: {list(engine.devices)} names {named} GPUs, and {engine.num_replicas} "
            f"replicas of {ranks} ranks with bridge.name = {config.bridge.name!r} need {wanted}; "
            "name that many, or set engine.device to cpu"
        )
    elif engine.device != "cpu" and (count := engines_on_a_gpu(config)) * engine.gpu_memory_utilization > 1:
        yield (
            f"engine.gpu_memory_utilization: {engine.gpu_memory_utilization:g} is the share of each engine, and "
            f"{count} are on one GPU; lower it to {int(1000 / count) / 1000:g} or less, or start fewer"
        )
    num_gpus = len(set(learner.devices))
    if learner.device != "cpu" and learner.data_parallel_size == 1 and num_gpus != learner.tensor_parallel_size:
        yield (
            f"learner.devices: {list(learner.devices)} names {num_gpus} GPUs for learner.tensor_parallel_size = "
            f"{learner.tensor_parallel_size}; name one for each rank, or set learner.device to cpu"
        )
    if learner.device != "cpu" and learner.data_parallel_size > 1 and learner.data_parallel_size % max(1, num_gpus):
        yield (
            f"learner.devices: {list(learner.devices)} names {num_gpus} GPUs for learner.data_parallel_size = "
            f"{learner.data_parallel_size}; name one for each rank (of several hosts under torchrun, those of one), or "
            "set learner.device to cpu"
        )
    if "cpu" in (config.engine.device, config.learner.device) and "cuda" in (
        config.engine.device,
        config.learner.device,
    ):
        yield (
            f"learner.device: {config.learner.device!r} differs from engine.device = {config.engine.device!r}, and "
            "vLLM is installed for one of them; set both alike"
        )


def _ranks(config: RunConfig) -> Iterator[str]:
    learner = config.learner
    size, num_data = learner.tensor_parallel_size, learner.data_parallel_size
    if size > 1 and num_data > 1:
        yield (
            f"learner.data_parallel_size: {num_data} splits parameters, and learner.tensor_parallel_size = {size} does "
            "so otherwise; set one of the two to 1"
        )
    if num_data > 1 and config.bridge.name == "shared":
        remedy = "lora" if config.model.lora else "broadcast, or learner.tensor_parallel_size instead"
        yield (
            f"learner.data_parallel_size: {num_data} leaves a rank a part of every parameter, and bridge.name = "
            f"'shared' needs parameters as the engine has them in one place; set bridge.name to {remedy}"
        )
    if num_data > 1 and config.model.lora and config.model.lora.target_parameters:
        yield (
            f"learner.data_parallel_size: {num_data} does not split adapters of parameters, and "
            "model.lora.target_parameters names some; set it to 1, or leave those out"
        )
    if size > 1 and config.model.lora:
        yield (
            f"learner.tensor_parallel_size: {size} does not split adapters, and model.lora is set; set it to 1, or "
            "leave model.lora out"
        )


def _in_flight(config: RunConfig) -> Iterator[str]:
    bridge = config.bridge
    if bridge.frozen_kv == "reuse" and bridge.in_flight != "keep":
        yield (
            f"bridge.frozen_kv: 'reuse' is for frozen requests, and bridge.in_flight = {bridge.in_flight!r} freezes "
            "none; set bridge.in_flight to keep"
        )
    if bridge.in_flight == "keep" and bridge.name == "restart" and bridge.restart == "process":
        yield (
            "bridge.in_flight: 'keep' cannot keep requests of a process that bridge.restart = 'process' replaces; "
            "set it to drain, or bridge.restart to in_place"
        )


def _bridge(config: RunConfig) -> Iterator[str]:
    if config.bridge.name != "shared":
        return
    if config.engine.tensor_parallel_size != config.learner.tensor_parallel_size:
        remedy = "set bridge.name to lora" if config.model.lora else "set both alike, or use restart"
        yield (
            f"learner.tensor_parallel_size: {config.learner.tensor_parallel_size} is not engine.tensor_parallel_size = "
            f"{config.engine.tensor_parallel_size}, and with bridge.name = 'shared' each rank of the one trains the "
            f"memory of one of the other; {remedy}"
        )
    if config.engine.devices != config.learner.devices or config.engine.device != config.learner.device:
        yield (
            f"learner.devices: {list(config.learner.devices)} ({config.learner.device}) is not engine.devices = "
            f"{list(config.engine.devices)} ({config.engine.device}), whose memory bridge.name = 'shared' uses; "
            "set both alike, or use restart"
        )
    for option in ("quantization", "enable_sleep_mode", "enable_cumem_allocator", "cpu_offload_gb"):
        if config.engine.extra.get(option):
            yield (
                f"engine.extra.{option}: {config.engine.extra[option]!r} moves or repacks the weights that "
                f"bridge.name = 'shared' trains in place; leave it out{_or_restart(option)}"
            )


def _published(config: RunConfig) -> Iterator[str]:
    """Between publishes learner and engines differ, so what compares them, or is resumed from, waits for one."""
    interval = config.bridge.interval
    if interval > 1 and config.bridge.name == "shared" and config.model.lora is None:
        yield (
            f"bridge.interval: {interval} leaves engines on an older version, and with bridge.name = 'shared' every "
            "step changes what they read; set it to 1, or use restart"
        )
    for field, value in (
        ("learner.checkpoint_interval", config.learner.checkpoint_interval),
        ("parity.interval", config.parity.interval),
    ):
        if value % interval and value < config.run.num_steps:
            yield (
                f"{field}: {value} falls between two publishes, which are every bridge.interval = {interval} steps; "
                "make it a multiple of that"
            )


def _broadcast(config: RunConfig) -> Iterator[str]:
    if config.bridge.name != "broadcast":
        if config.bridge.sparse:
            yield (
                f"bridge.sparse: true sends only what changed, and bridge.name = {config.bridge.name!r} sends no "
                "weights in buckets; leave it out, or set bridge.name to broadcast"
            )
        return
    if config.engine.device == "cuda" and config.learner.device == "cuda":
        yield from gpus_held_twice(config)
    for option in ("quantization", "cpu_offload_gb"):
        if config.engine.extra.get(option):
            yield (
                f"engine.extra.{option}: {config.engine.extra[option]!r} moves or repacks the weights that "
                f"bridge.name = 'broadcast' writes in place; leave it out{_or_restart(option)}"
            )


def _or_restart(option: str) -> str:
    """A reload fills memory that was moved, but proves no weights that were repacked."""
    return "" if option == "quantization" else ", or use restart"


def gpus_held_twice(config: RunConfig) -> Iterator[str]:
    """On GPUs alone, which `auto` leaves to the machine: whoever knows the machine asks again."""
    if config.bridge.name == "broadcast" and (both := set(all_devices(config)) & set(config.learner.devices)):
        where = "engine.servers" if config.engine.servers else "engine.devices"
        yield (
            f"learner.devices: {list(config.learner.devices)} has GPU {min(both)} of {where} = "
            f"{list(all_devices(config))}, and NCCL cannot broadcast within one GPU; give the learner its own, or "
            "set bridge.name to shared"
        )


def _adapter(config: RunConfig) -> Iterator[str]:
    lora, bridge = config.model.lora, config.bridge
    if lora is None and bridge.name == "lora":
        yield "bridge.name: 'lora' moves an adapter, and model.lora is absent; set model.lora, or use restart"
    if lora is None or not serves_adapters(config):
        return
    if lora.rank > ENGINE_LORA_RANKS[-1]:
        yield f"model.lora.rank: {lora.rank} is above vLLM's largest, {ENGINE_LORA_RANKS[-1]}; lower it, or use restart"
    targets = (lora.target_modules,) if isinstance(lora.target_modules, str) else lora.target_modules
    for target in targets:
        if target.rsplit(".", 1)[-1] in _NOT_LINEAR:
            yield f"model.lora.target_modules: {target!r} is not served as an adapter; leave it out"
    if lora.dora:
        yield (
            "model.lora.dora: true gives rows magnitudes, which an engine cannot serve beside its base as bridge.name "
            f"= {bridge.name!r} needs; set it to false, or use restart or broadcast, which merge it"
        )
    if bridge.in_flight == "keep":
        yield (
            "bridge.in_flight: 'keep' moves requests to the next version, and with model.lora and "
            f"bridge.name = {bridge.name!r} they end, unpaused, under the adapter they began with; set it to drain"
        )
    yield from _adapter_engine(config)


def _adapter_engine(config: RunConfig) -> Iterator[str]:
    extra = config.engine.extra
    for option in ("enable_lora", "max_lora_rank", "lora_dtype", "lora_target_modules", "max_cpu_loras"):
        if option in extra:
            yield f"engine.extra.{option}: {extra[option]!r} is set from model.lora; leave it out"
    if extra.get("max_loras", 2) < 2:
        yield (
            f"engine.extra.max_loras: {extra['max_loras']} leaves no slot for the next version beside the one that is "
            "sampled from; raise it to 2"
        )
    if extra.get("quantization") and config.bridge.name == "lora":
        yield (
            f"engine.extra.quantization: {extra['quantization']!r} changes the base, which bridge.name = 'lora' proves "
            "to be the learner's; leave it out"
        )


def _parts(config: RunConfig) -> Iterator[str]:
    """Of a vision-language model."""
    parts, lora, bridge = config.model.parts, config.model.lora, config.bridge.name
    fates = {"language": parts.language, "aligner": parts.aligner, "vision": parts.vision}
    for part, fate in fates.items():
        if fate == "adapted" and lora is None:
            yield f"model.parts.{part}: 'adapted' needs model.lora, which is absent; set model.lora, or say trained"
        beside = fate == "trained" or (part != "language" and fate == "adapted")
        if beside and serves_adapters(config):
            yield (
                f"model.parts.{part}: {fate!r} changes what bridge.name = {bridge!r} does not move, because the engine "
                "serves the language model's adapter alone; freeze it, or use restart or broadcast, which merge"
            )
    if lora and not {"auto", "adapted"} & set(fates.values()):
        yield "model.lora: is set, and model.parts adapts nothing; adapt a part, or leave model.lora out"
    if set(fates.values()) == {"frozen"}:
        yield "model.parts: every part is frozen, so nothing is trained; train or adapt one"
    for part in ("aligner", "vision"):
        rate = getattr(config.learner.optimizer, f"{part}_learning_rate")
        if rate is not None and fates[part] == "frozen":
            yield (
                f"learner.optimizer.{part}_learning_rate: {rate:g} moves nothing, because model.parts.{part} is "
                "frozen; train or adapt it, or leave the rate out"
            )


def _deadlines(config: RunConfig) -> Iterator[str]:
    if config.engine.request_timeout_seconds >= config.trajectory.lease_seconds:
        yield (
            f"engine.request_timeout_seconds: {config.engine.request_timeout_seconds:g} is not below "
            f"trajectory.lease_seconds = {config.trajectory.lease_seconds:g}, so a permit could expire while its group "
            "is sampled; lower it, or raise the lease"
        )


def _ports(config: RunConfig) -> Iterator[str]:
    engine_ports = range(config.engine.port, config.engine.port + len(servers(config)))
    if config.engine.port and config.trajectory.port in engine_ports:
        yield f"trajectory.port: {config.trajectory.port} is an engine's port too; set one of the two to 0 or another"
    if engine_ports and engine_ports[-1] > MAX_PORT:
        yield (
            f"engine.port: {config.engine.port} + {len(engine_ports) - 1} is the last engine's, and ports end at "
            f"{MAX_PORT}; lower it"
        )
    for section in ("engine", "trajectory"):
        host = getattr(config, section).host
        if host not in LOOPBACK:
            yield (
                f"{section}.host: {host!r} would open the port to the network, and this version has no access "
                "token; use 127.0.0.1"
            )


_RULES = (
    _lengths,
    _distribution,
    _loss,
    _schedule,
    _memory,
    _evaluation,
    _environments,
    _devices,
    server_rules,
    engine_options,
    _ranks,
    _in_flight,
    _bridge,
    _published,
    _broadcast,
    _adapter,
    _parts,
    _deadlines,
    _ports,
)
