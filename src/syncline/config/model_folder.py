"""What a model's folder says of its weights, read without torch."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from syncline.config.schema import RunConfig

MXFP4 = "mxfp4"
_COMPRESSED = "compressed-tensors"
_WORDS = (4, 8)
"""Bits of integers that vLLM's kernels take."""
_FP8_LAYERS = "with one scale a layer, and vLLM quantises layers that it fuses again, to give them one"
_FP8_BLOCKS = (
    "by blocks, whose weights vLLM's kernels for them may quantise again (DeepGEMM, with scales that are powers of "
    "two) or do not take (a CPU without AMX)"
)


def quantisation(path: str) -> str | None:
    """How the weights in a local folder are packed (`"mxfp4"`, `"gptq"`); `None`: not at all, or `path` is the name of
    a model on the hub, which nobody has asked yet."""
    return _settings(path).get("quant_method")


def _settings(path: str) -> dict[str, Any]:
    try:
        values = json.loads((Path(path) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values.get("quantization_config") or {}


def packed_faults(config: RunConfig) -> list[str]:
    """What a packed base cannot be used with; a folder's, not yet a hub name's. The engine keeps such a base as it is,
    so an adapter alone can be moved."""
    settings = _settings(config.model.path)
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
    return faults


def _unreadable(settings: Mapping[str, Any], *, on_cpu: bool) -> Iterator[str]:
    """Why learner and engine would not compute with the same values, or nobody has proved that they do."""
    packed = settings["quant_method"]
    if packed == MXFP4:
        return
    if packed == "gptq":
        yield from _gptq(settings, on_cpu=on_cpu)
    elif packed == "awq":
        layout = (settings.get("version", "gemm").lower(), settings.get("bits"), settings.get("zero_point"))
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
