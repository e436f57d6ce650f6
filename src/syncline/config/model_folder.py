"""What a model's folder says of its weights, read without torch."""

import json
from pathlib import Path

from syncline.config.schema import RunConfig

MXFP4 = "mxfp4"


def quantisation(path: str) -> str | None:
    """How the weights in a local folder are packed (`"mxfp4"`, `"gptq"`); `None`: not at all, or `path` is the name of
    a model on the hub, which nobody has asked yet."""
    try:
        values = json.loads((Path(path) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return (values.get("quantization_config") or {}).get("quant_method")


def packed_faults(config: RunConfig) -> list[str]:
    """What a packed base cannot be used with; a folder's, not yet a hub name's. MXFP4 alone can be used at all: the
    engine keeps it as it is."""
    packed = quantisation(config.model.path)
    if packed is None:
        return []
    if packed != MXFP4:
        return [
            f"model.path: {config.model.path!r} is quantised by {packed!r}, and no bridge has been shown to prove such "
            "a base; give the model it was made from, or one in MXFP4"
        ]
    faults, on_gpu = [], "cuda" in (config.engine.device, config.learner.device)
    if config.model.lora is None or config.bridge.name != "lora":
        faults.append(
            f"bridge.name: {config.bridge.name!r} would write weights into a base of MXFP4, which the engine keeps as "
            "it is; set model.lora, and bridge.name to lora, which moves the adapter alone"
        )
    if config.model.dtype == "float32" or (config.model.dtype == "auto" and not on_gpu):
        faults.append(
            f"model.dtype: {config.model.dtype!r} may be float32, and vLLM computes MXFP4 in bfloat16 alone; set it to "
            "bfloat16"
        )
    if config.learner.data_parallel_size > 1:
        faults.append(
            f"learner.data_parallel_size: {config.learner.data_parallel_size} leaves a rank a part of the experts, "
            "whose MXFP4 is proved whole; set it to 1"
        )
    return faults
