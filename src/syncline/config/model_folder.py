"""What a model's folder says of its weights, read without torch."""

import json
from pathlib import Path

MXFP4 = "mxfp4"


def quantisation(path: str) -> str | None:
    """How the weights in a local folder are packed (`"mxfp4"`, `"gptq"`); `None`: not at all, or `path` is the name of
    a model on the hub, which nobody has asked yet."""
    try:
        values = json.loads((Path(path) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return (values.get("quantization_config") or {}).get("quant_method")
