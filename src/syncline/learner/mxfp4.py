"""A base whose experts are MXFP4 in the checkpoint: the learner computes with their bfloat16 values.

MXFP4 keeps 32 neighbours as 4-bit floats (E2M1, two a byte) under one power of two (E8M0, a byte); every such value is
a bfloat16, so nothing is lost. The engine keeps its own packing of them, which nobody can compare with bfloat16. What
both sides can tell is what they were given: `stored_experts` proves that the learner's values are those of the
checkpoint's blocks, and gives the digests of the blocks, which the engine took of what it loaded.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from syncline.bridges.receipt import parameter_digests
from syncline.config.model_folder import MXFP4
from syncline.errors import SyncError

BLOCKS, SCALES = "_blocks", "_scales"


def is_expert(name: str) -> bool:
    """Of a parameter's or a checkpoint tensor's name."""
    return ".experts." in name


def dequantised(settings: Any) -> dict[str, Any]:
    """Options of `from_pretrained` for a checkpoint with this configuration; none where it is not MXFP4."""
    from transformers.utils.quantization_config import Mxfp4Config

    stored = getattr(settings, "quantization_config", None) or {}
    method = stored.get("quant_method") if isinstance(stored, Mapping) else getattr(stored, "quant_method", None)
    return {"quantization_config": Mxfp4Config(dequantize=True)} if method == MXFP4 else {}


def in_one_type(model: Any, dtype: torch.dtype) -> Any:
    """The model with its experts in `dtype` too, which transformers leaves in bfloat16."""
    for name, parameter in model.named_parameters():
        if is_expert(name) and parameter.dtype != dtype:
            parameter.data = parameter.data.to(dtype)
    return model


def stored_experts(base: Mapping[str, torch.Tensor], folder: Path) -> dict[str, str]:
    """Name → digest of every tensor of the experts in the checkpoint. `base` are the learner's, by checkpoint name.

    Raises `SyncError` naming a parameter whose values in memory are not those of the checkpoint.
    """
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    found: dict[str, str] = {}
    with ExitStack() as files:
        stored = opened(folder, files)
        for name, parameter in ((n, p) for n, p in base.items() if is_expert(n)):
            if name + BLOCKS not in stored:
                found |= parameter_digests([(name, parameter)])
                continue
            blocks, scales = (
                stored[name + end].get_tensor(name + end).to(parameter.device) for end in (BLOCKS, SCALES)
            )
            if not torch.equal(convert_moe_packed_tensors(blocks, scales).to(parameter.dtype), parameter):
                raise SyncError(f"{name}: the learner's values are not those of the blocks in {folder}")
            found |= parameter_digests([(name + BLOCKS, blocks), (name + SCALES, scales)])
    return found


def opened(folder: Path, files: ExitStack) -> dict[str, Any]:
    """Tensor → the open safetensors file that holds it."""
    return {name: file for file in _each(folder, files) for name in file.keys()}  # noqa: SIM118


def _each(folder: Path, files: ExitStack) -> Iterator[Any]:
    from safetensors import safe_open

    for path in sorted(folder.glob("*.safetensors")):
        yield files.enter_context(safe_open(path, framework="pt"))
