"""Rules of `engine.extra`: vLLM's own options pass through untouched, but for those that fields of ours set, that a
proof of the weights stands on, or that a bridge cannot serve."""

from collections.abc import Iterator

from syncline.config.schema import RunConfig
from syncline.config.servers import num_stages

OWN_FIELDS = {
    "model": "model.path",
    "tokenizer": "model.tokenizer",
    "dtype": "model.dtype",
    "max_model_len": "model.max_length",
    "host": "engine.host",
    "port": "engine.port",
    "max_num_seqs": "engine.max_num_seqs",
    "enforce_eager": "engine.enforce_eager",
    "gpu_memory_utilization": "engine.gpu_memory_utilization",
    "tensor_parallel_size": "engine.tensor_parallel_size",
    "data_parallel_size": "engine.num_replicas",
    "seed": "run.seed",
}
"""vLLM's option → the field of ours that sets it."""
MODELS_OWN_LENGTH = ("max_model_len", -1)
"""What no field says: vLLM's context is the model's own, as much of it as fits; `model.max_length` is the learner's."""
PROOF = ("worker_extension_cls", "logprobs_mode", "load_format", "generation_config", "served_model_name")
"""What every engine is started with, so that versions and digests, and the sampler's log-probabilities, are what they
are said to be."""


def engine_options(config: RunConfig) -> Iterator[str]:
    """Every fault, with field, value and remedy."""
    extra, bridge = config.engine.extra, config.bridge.name
    for option, field in OWN_FIELDS.items():
        if option in extra and (option, extra[option]) != MODELS_OWN_LENGTH:
            yield f"engine.extra.{option}: {extra[option]!r} is set from {field}; set that"
    for option in PROOF:
        if option in extra:
            yield f"engine.extra.{option}: {extra[option]!r} is what proofs and log-probabilities rest on; leave it out"
    if extra.get("enable_expert_parallel"):
        yield (
            f"engine.extra.enable_expert_parallel: {extra['enable_expert_parallel']!r} lays whole experts on different "
            "ranks, where no bridge has been shown to prove them or their adapters; leave it out"
        )
    if num_stages(config) > 1 and bridge == "shared":
        remedy = "lora" if config.model.lora else "broadcast or restart"
        yield (
            f"engine.extra.pipeline_parallel_size: {num_stages(config)} gives ranks different layers, and with "
            "bridge.name = 'shared' each rank of the learner trains the memory of one of the engine's, in every layer; "
            f"leave it out, or set bridge.name to {remedy}"
        )
    if bridge == "restart" and extra.get("quantization"):
        yield (
            f"engine.extra.quantization: {extra['quantization']!r} repacks the weights that bridge.name = 'restart' "
            "proves to be the learner's; leave it out: a quantised base is served with an adapter alone, from a "
            "checkpoint that is quantised itself, by bridge.name lora"
        )
