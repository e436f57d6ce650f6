"""Our configuration → the options of vLLM's own parser, which checks what is passed through."""

import json
import logging
import os
import re
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from syncline.config import RunConfig
from syncline.config.model_folder import MXFP4, expert_faults, known_settings
from syncline.config.rules import ENGINE_LORA_RANKS, serves_adapters
from syncline.config.servers import engines_on_a_gpu, num_stages
from syncline.engines.vllm import compat
from syncline.engines.vllm.packed_experts import stored_format
from syncline.engines.vllm.plugin import ATTACHED, UNPACKED, WITNESSED
from syncline.errors import ConfigError

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Start:
    """What the engine process starts from."""

    port: int
    checkpoint: str | None = None
    """Weights that differ from the configured model's: the bridge's last version."""
    policy_version: int = -1
    attach_to: str | None = None
    """URL of the engine that owns the weights this one uses too."""
    bridge_config: str | None = None
    """Where `bridges.bridge_file` is written; `None`: nowhere."""


def engine_device(config: RunConfig) -> str:
    """`"cuda"` or `"cpu"`. Raises when CUDA is asked for and absent."""
    import torch

    found = "cuda" if torch.cuda.is_available() else "cpu"
    if config.engine.device == "cuda" and found == "cpu":
        raise ConfigError(["engine.device: 'cuda', but torch sees no NVIDIA GPU; set it to cpu, or mend the driver"])
    return found if config.engine.device == "auto" else config.engine.device


def set_environment(config: RunConfig, device: str) -> None:
    """Variables vLLM reads at import. Only in the engine's own process, before vLLM is imported."""
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")  # stdout is for what a verb prints
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    if config.bridge.name == "shared" and device == "cuda":
        _export_whole_segments()
    if device == "cpu":
        os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        os.environ.setdefault("VLLM_CPU_INT4_W4A8", "0")  # it rounds activations, the learner does not
        threads = config.engine.num_threads or os.cpu_count() or 1
        ranks = config.engine.tensor_parallel_size * num_stages(config)
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, threads // ranks)))


def _export_whole_segments() -> None:
    """CUDA IPC hands out what cudaMalloc gave. torch's expandable segments are mapped piece by piece, and another
    process opens such ones by file descriptors that containers forbid, or not at all."""
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        asked = [part for part in os.environ.get(name, "").split(",") if part]
        kept = [part for part in asked if part.partition(":")[0].strip() != "expandable_segments"]
        if kept != asked:
            os.environ[name] = ",".join(kept)
            log.warning(
                "%s: expandable_segments is left out in the engine, whose weights bridge.name = 'shared' hands to the "
                "learner by CUDA IPC, as no expandable segment can be", name,
            )  # fmt: skip


def parse(config: RunConfig, device: str, start: Start) -> Namespace:
    """vLLM's argument namespace. Raises `ConfigError` for what its parser does not take of `engine.extra`."""
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parts = compat.server_parts()
    parser = parts.make_arg_parser(FlexibleArgumentParser(prog="syncline serve"))

    def refuse(message: str) -> NoReturn:
        raise _refused(config, message)

    parser.error = refuse  # pyright: ignore[reportAttributeAccessIssue]
    try:
        args = parser.parse_args(_options(config, device, start))
        parts.validate_args(args)
    except (ValueError, TypeError) as error:
        raise _refused(config, str(error)) from error
    return args


def refuse_unusable(config: RunConfig, args: Namespace) -> None:
    """Raises `ConfigError` for what an engine would refuse before it loads a model: all of vLLM's configuration is
    made, from these arguments and the model's config.json."""
    from vllm.engine.arg_utils import AsyncEngineArgs

    try:
        AsyncEngineArgs.from_cli_args(args).create_engine_config()
    except (ValueError, TypeError, AssertionError, OSError, RuntimeError, ImportError) as error:
        raise _refused(config, str(error)) from error


def _refused(config: RunConfig, told: str) -> ConfigError:
    """In vLLM's words, with the field: the option of `engine.extra` that it speaks of, by its flag or otherwise."""
    named = [
        f"engine.extra.{option}: {value!r}"
        for option, value in config.engine.extra.items()
        if re.search(rf"\b{option.replace('_', '[-_ ]')}\b", told, re.IGNORECASE)
    ]
    if named:
        return ConfigError([f"{', '.join(named)} is refused by vLLM {compat.vllm_version()}; change it: {told}"])
    return ConfigError([f"engine: vLLM {compat.vllm_version()} refuses what it would be started with: {told}"])


def _options(config: RunConfig, device: str, start: Start) -> list[str]:
    engine = config.engine
    eager = engine.enforce_eager if engine.enforce_eager is not None else device == "cpu"
    values: dict[str, Any] = {
        "model": start.checkpoint or config.model.path,
        "served_model_name": config.model.path,
        "tokenizer": config.model.tokenizer or config.model.path,
        "host": engine.host,
        "port": start.port,
        "dtype": engine_dtype(config, device),
        "max_model_len": config.model.max_length,
        "max_num_seqs": engine.max_num_seqs,
        "seed": config.run.seed,
        "logprobs_mode": "processed_logprobs",
        "worker_extension_cls": "syncline.engines.vllm.worker.WorkerExtension",
        "generation_config": "vllm",
        "enforce_eager": eager,
        "tensor_parallel_size": engine.tensor_parallel_size,
        "disable_uvicorn_access_log": True,
        "use_tqdm_on_load": False,
    }
    if device == "cpu":
        # of a prompt read in parts vLLM rewinds the random generator, which a CPU's cannot
        values |= {"load_format": UNPACKED, "kv_cache_memory_bytes": engine.kv_cache_bytes}
        values |= {"enable_chunked_prefill": False}
    else:
        values |= {"gpu_memory_utilization": engine.gpu_memory_utilization}
        if engines_on_a_gpu(config) > 1:
            # They start at once, and vLLM, which measures, would take what the others allocate for its own. Told this,
            # it neither measures nor asserts that nobody freed any meanwhile (0.26 to 0.33). The other half is for
            # context, graphs, activations and, of `shared` in the owner's alone, weights.
            values |= {"kv_cache_memory_bytes": int(engine.gpu_memory_utilization * compat.gpu_bytes() / 2)}
        if engine.tensor_parallel_size * num_stages(config) == 1:
            # one worker has a process of its own, as several have: it launches a step while the core schedules the next
            values |= {"distributed_executor_backend": "mp"}
    if serves_adapters(config):
        values |= _adapter_options(config)
    shares, packing = config.bridge.name == "shared", stored_format(config)
    if packing == MXFP4 and (faults := [*expert_faults(config, known_settings(config.model.path))]):
        raise ConfigError(faults)
    if device != "cpu" and (packing or shares):
        values |= {"load_format": WITNESSED}
    values |= engine.extra
    if shares:
        values |= _one_copy(config, start, values)
    return [word for name, value in values.items() for word in _option(name, value)]


def _adapter_options(config: RunConfig) -> dict[str, Any]:
    """Two slots: the version that is sampled from, and the next beside it. Slots are in the model's own type."""
    lora = config.model.lora
    assert lora is not None
    rank = next(rank for rank in ENGINE_LORA_RANKS if rank >= lora.rank)
    return {"enable_lora": True, "max_loras": 2, "lora_dtype": "auto", "max_lora_rank": rank}


def _one_copy(config: RunConfig, start: Start, values: Mapping[str, Any]) -> dict[str, Any]:
    """For our loaders: whom to tell where the weights lie, or to ask. Raises `ConfigError` for one that would attach to
    an engine that is alone by its configuration: on a GPU both would measure what the other allocates."""
    extra, timeout_seconds = values.get("model_loader_extra_config", {}), config.engine.start_timeout_seconds
    if start.attach_to is None:
        return {"model_loader_extra_config": {**extra, "one_copy": {"port": start.port}}}
    if engines_on_a_gpu(config) == 1 and "kv_cache_memory_bytes" not in values:
        raise ConfigError(["engine.num_replicas: 1, and --attach-to starts another; set it to how many there are"])
    asked = {"url": start.attach_to, "timeout_seconds": timeout_seconds}
    return {"load_format": ATTACHED, "model_loader_extra_config": {**extra, "one_copy": asked}}


def engine_dtype(config: RunConfig, device: str) -> str:
    if config.model.dtype != "auto":
        return config.model.dtype
    return "bfloat16" if device == "cuda" else "float32"


def _option(name: str, value: Any) -> list[str]:
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    return [f"--{flag}", json.dumps(value) if isinstance(value, dict | list) else str(value)]
