"""What a model's folder says of its weights, read without torch."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict

from syncline.config.load import validated
from syncline.config.schema import RunConfig
from syncline.config.servers import servers
from syncline.errors import ConfigError

MXFP4 = "mxfp4"
WITH_ADAPTERS = ("auto", "marlin")
"""Of `moe_backend`: kernels whose packing of MXFP4 can be measured, and which add adapters."""
_MARLIN_COLUMNS = 128
"""Of a rank's experts: Marlin pads to a multiple of it."""
_COMPRESSED = "compressed-tensors"
_REMEDY = "mend it, or fetch the model again"
_WORDS = (4, 8)
"""Bits of integers that vLLM's kernels take."""
_FP8_LAYERS = "with one scale a layer, and vLLM quantises layers that it fuses again, to give them one"
_FP8_BLOCKS = (
    "by blocks, whose weights vLLM's kernels for them may quantise again (DeepGEMM, with scales that are powers of "
    "two) or do not take (a CPU without AMX)"
)


def _size(value: Any) -> Any:
    """Some families have a list: one for each layer."""
    if value is None or isinstance(value, list) or (type(value) is int and value > 0):
        return value
    raise ValueError(f"{value!r} is no whole number above 0")


def _count(value: Any) -> Any:
    """0: the family can have some, and the model has none."""
    return value if value == 0 and type(value) is int else _size(value)


Size = Annotated[Any, BeforeValidator(_size)]
Count = Annotated[Any, BeforeValidator(_count)]


class _Read(BaseModel):
    """What is read of a config.json, here and by `launch.shape`; `null` is as good as absent."""

    model_config = ConfigDict(strict=True, frozen=True)


class _Weights(_Read):
    num_bits: float | None = None
    group_size: int | None = None


class _Group(_Read):
    weights: _Weights | None = None


class _Packing(_Read):
    quant_method: str | None = None
    version: str | None = None
    bits: float | None = None
    group_size: int | None = None
    dynamic: dict[str, Any] | None = None
    config_groups: dict[str, _Group] | None = None


class _Decoder(_Read):
    model_type: str | None = None
    hidden_size: Size = None
    num_hidden_layers: Size = None
    num_attention_heads: Size = None
    num_key_value_heads: Size = None
    head_dim: Size = None
    intermediate_size: Count = None
    moe_intermediate_size: Count = None
    vocab_size: Size = None
    num_experts: Count = None
    num_local_experts: Count = None
    n_routed_experts: Count = None
    num_experts_per_tok: Count = None
    layer_types: list[str] | None = None
    sliding_window: Count = None


class _Model(_Decoder):
    text_config: _Decoder | None = None
    vision_config: dict[str, Any] | None = None
    quantization_config: _Packing | None = None


def quantisation(path: str) -> str | None:
    """How the weights of a model are packed (`"mxfp4"`, `"gptq"`); `None`: not at all, or nobody has its config.json
    here (see `known_settings`)."""
    return (known_settings(path).get("quantization_config") or {}).get("quant_method")


def known_settings(path: str, *, field: str = "model.path") -> dict[str, Any]:
    """A model's config.json: a folder's, or of a hub name the one in the hub's cache. Nobody is asked over a network,
    so it is empty for a model that was never fetched. Raises `ConfigError` for a folder that has none, and what
    `read_settings` does."""
    from huggingface_hub import try_to_load_from_cache

    try:
        file = Path(path) / "config.json" if Path(path).is_dir() else try_to_load_from_cache(path, "config.json")
    except (OSError, ValueError) as error:
        fault = f"{path!r} is no folder that can be read here, and no name of the hub ({error})"
        raise ConfigError([f"{field}: {fault}; give one of the two"]) from error
    return read_settings(Path(file), field=field) if isinstance(file, str | Path) else {}


def read_settings(file: Path, *, field: str = "model.path") -> dict[str, Any]:
    """A config.json. Raises `ConfigError` for one that cannot be read, or whose values are none that a model has."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        remedy = "give a model's folder, or a name of the hub"
        raise ConfigError([f"{field}: {file} cannot be read ({error.strerror}); {remedy}"]) from error
    except (ValueError, RecursionError) as error:
        raise ConfigError([f"{field}: {file} is no JSON ({error}); {_REMEDY}"]) from error
    if not isinstance(found, dict):
        raise ConfigError([f"{field}: {file} holds a {type(found).__name__}, and no settings by name; {_REMEDY}"])
    try:
        validated(_Model, found)
    except ConfigError as error:
        raise ConfigError(
            [f"{field}: {file}: {fault.partition(' or instance of ')[0]}; {_REMEDY}" for fault in error.faults]
        ) from None
    return found


def model_faults(config: RunConfig) -> list[str]:
    """What the model, by its config.json, cannot be used with."""
    return [*packed_faults(config), *_vision_faults(config)]


def _vision_faults(config: RunConfig) -> Iterator[str]:
    """As `learner.vision.refuse_family`, before anything is started."""
    settings = known_settings(config.model.path)
    for field in ("tensor_parallel_size", "data_parallel_size"):
        if settings.get("vision_config") and (ranks := getattr(config.learner, field)) > 1:
            yield (
                f"learner.{field}: {ranks} ranks do not share the vision tower of model.path = {config.model.path!r} "
                f"({settings.get('model_type')}); set it to 1"
            )


def packed_faults(config: RunConfig) -> list[str]:
    """What a packed base cannot be used with. The engine keeps such a base as it is, so an adapter alone can be
    moved."""
    known = known_settings(config.model.path)
    settings = known.get("quantization_config") or {}
    packed = settings.get("quant_method")
    if packed is None:
        return []
    on_gpu = "cuda" in (config.engine.device, config.learner.device)
    if reason := next(_unreadable(settings, on_cpu="cpu" in (config.engine.device, config.learner.device)), None):
        return [
            f"model.path: {config.model.path!r} is quantised by {packed!r}, {reason}; give the model it was made from, "
            "or one packed otherwise"
        ]
    name, faults = "MXFP4" if packed == MXFP4 else packed, []
    if config.model.lora is None or config.bridge.name != "lora":
        faults.append(
            f"bridge.name: {config.bridge.name!r} would write weights into a base of {name}, which the engine keeps as "
            "it is; set model.lora, and bridge.name to lora, which moves the adapter alone"
        )
    if config.model.dtype == "float32" or (config.model.dtype == "auto" and not on_gpu):
        faults.append(
            f"model.dtype: {config.model.dtype!r} may be float32, and vLLM computes {name} in bfloat16 alone; set it "
            "to bfloat16"
        )
    if config.learner.data_parallel_size > 1:
        faults.append(
            f"learner.data_parallel_size: {config.learner.data_parallel_size} leaves a rank a part of the weights, "
            f"whose {name} is proved whole; set it to 1"
        )
    return [*faults, *expert_faults(config, known)] if packed == MXFP4 else faults


def expert_faults(config: RunConfig, settings: Mapping[str, Any]) -> Iterator[str]:
    """Why vLLM could not adapt MXFP4 experts of a model with these `settings`, or nobody could measure them."""
    extra, inner = config.engine.extra, settings.get("intermediate_size") or 0
    if (backend := extra.get("moe_backend", "auto")) not in WITH_ADAPTERS:
        yield (
            f"engine.extra.moe_backend: {backend!r} has no adapters of MXFP4 experts, or keeps them where nobody can "
            "measure them; leave it out, or set it to marlin"
        )
    for option in ("fully_sharded_loras", "enable_mixed_moe_lora_format"):
        if extra.get(option):
            yield f"engine.extra.{option}: true lays adapters of experts out otherwise; leave it out"
    ranks = max(server.tensor_parallel_size for server in servers(config))
    if config.engine.device != "cpu" and not fits_marlin(inner, ranks):
        where = "engine.servers" if config.engine.servers else "engine.tensor_parallel_size"
        yield (
            f"{where}: {ranks} ranks have {inner // ranks} columns of the experts each, which vLLM pads to a multiple "
            f"of {_MARLIN_COLUMNS} and would cut their adapters there; set it to 1, and engine.num_replicas higher"
        )


def fits_marlin(inner: int, ranks: int) -> bool:
    """Whether `ranks` that share experts of `inner` columns have adapters cut where the experts are."""
    return ranks == 1 or inner % (ranks * _MARLIN_COLUMNS) == 0


def _unreadable(settings: Mapping[str, Any], *, on_cpu: bool) -> Iterator[str]:
    """Why learner and engine would not compute with the same values, or nobody has proved that they do."""
    packed = settings["quant_method"]
    if packed == MXFP4:
        return
    if packed == "gptq":
        yield from _gptq(settings, on_cpu=on_cpu)
    elif packed == "awq":
        layout = ((settings.get("version") or "gemm").lower(), settings.get("bits"), settings.get("zero_point"))
        if layout != ("gemm", 4, True):
            yield "and what is proved of it is four bits with zero points in the layout gemm"
    elif packed == "fp8":
        yield _FP8_BLOCKS if settings.get("weight_block_size") else _FP8_LAYERS
    elif packed == _COMPRESSED:
        yield from _compressed(settings)
    else:
        yield "and no bridge has been shown to prove such a base"


def _gptq(settings: Mapping[str, Any], *, on_cpu: bool) -> Iterator[str]:
    bits = settings.get("bits")
    if bits not in _WORDS or (on_cpu and bits != min(_WORDS)):
        yield f"with bits = {bits}, and vLLM's kernels take 4, on a GPU 8 too"
    if not settings.get("sym", True):
        yield "with sym = false, and vLLM reads no zero points of it"
    if settings.get("desc_act") and settings.get("group_size") != -1:
        yield "with desc_act, and vLLM takes no groups whose inputs are reordered"
    if settings.get("lm_head"):
        yield "its output layer too, which nobody has been shown to prove"
    if any(not rule.startswith("-:") for rule in settings.get("dynamic") or {}):
        yield "with settings of their own for some layers (dynamic), which the learner does not read"


def _compressed(settings: Mapping[str, Any]) -> Iterator[str]:
    kind, groups = settings.get("format"), list((settings.get("config_groups") or {}).values())
    weights = groups[0].get("weights") or {} if len(groups) == 1 else {}
    asked = (kind, weights.get("type"), weights.get("strategy"))
    proved = {("float-quantized", "float", "channel")}
    proved |= {("pack-quantized", "int", strategy) for strategy in ("channel", "group")}
    if settings.get("kv_cache_scheme"):
        yield "its KV cache too, and the learner has none (kv_cache_scheme)"
    if asked not in proved or not weights.get("symmetric") or weights.get("actorder") == "group":
        yield (
            "and what is proved of it is one group of float-quantized by channel, or of pack-quantized by channel or "
            "group, symmetric and in order"
        )
