"""Experts in MXFP4: what vLLM was handed of them (and of packed layers), what its kernels read, what can be adapted.

vLLM repacks blocks and scales for its kernels once they are loaded, and on a GPU keeps nothing else. So `witnessed`
digests each tensor of the experts on its way into the model, under its checkpoint name, and `repacked_pieces` what came
of them; the first proves where the base came from, the second that it never moves.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from syncline.bridges.manifest import Shard
from syncline.bridges.receipt import parameter_digests
from syncline.bridges.repacked import packed_layers
from syncline.config.model_folder import quantisation
from syncline.config.schema import RunConfig
from syncline.engines.vllm.packed_layers import side_by_side
from syncline.errors import SyncError

GPT_OSS_MXFP4 = "gpt_oss_mxfp4"
"""vLLM's name for it."""


def stored_format(config: RunConfig) -> str | None:
    """`"mxfp4"`, `"gptq"`, as the model's own configuration says it; `None`: not quantised, or no model, which vLLM
    will say. In the engine's process alone."""
    from transformers import AutoConfig

    if Path(config.model.path).is_dir():
        return quantisation(config.model.path)
    try:
        settings = AutoConfig.from_pretrained(config.model.path)
    except (OSError, ValueError):
        return None
    return (getattr(settings, "quantization_config", None) or {}).get("quant_method")


def is_packed(module: Any) -> bool:
    """Of a `RoutedExperts`."""
    return hasattr(_method(module), "mxfp4_backend")


def repacked_pieces(name: str, tensor: torch.Tensor, module: Any) -> Iterator[tuple[str, Shard]]:
    """This rank's bytes of a parameter."""
    _refuse_unseen(name, module)
    parallel = module.moe_config.moe_parallel_config
    yield side_by_side(name, tensor, rank=parallel.tp_rank, ranks=parallel.tp_size)


def _refuse_unseen(name: str, module: Any) -> None:
    held = {leaf for leaf, _ in module.named_parameters(recurse=False)}
    if missing := {"w13_weight", "w2_weight", "w13_weight_scale", "w2_weight_scale"} - held:
        raise SyncError(
            f"{name}: vLLM's {_method(module).mxfp4_backend.name} kernels keep {', '.join(sorted(missing))} where "
            "nobody can measure them; set engine.extra to {moe_backend: marlin}"
        )


def _method(module: Any) -> Any:
    """Serving adapters wraps it."""
    return getattr(module.quant_method, "old_quant_method", module.quant_method)


def witnessed(
    weights: Iterable[tuple[str, torch.Tensor]], model: Any, *, quantisation: str | None
) -> Iterator[tuple[str, torch.Tensor]]:
    """What a loader reads, as it is; the names, and of what vLLM will repack the digests, are kept with the model."""
    handed: dict[str, str] = {}
    names: set[str] = set()
    for name, tensor in weights:
        names.add(name)
        if quantisation is not None and (quantisation != GPT_OSS_MXFP4 or ".experts." in name):
            handed |= parameter_digests([(name, tensor)])
        yield name, tensor
    if quantisation != GPT_OSS_MXFP4:  # a layer's bias may come before what says that the layer is packed
        layers = packed_layers(names)
        handed = {name: digest for name, digest in handed.items() if name.rpartition(".")[0] in layers}
    model.syncline_handed, model.syncline_loaded = handed, frozenset(names)


def handed_to(model: Any) -> dict[str, str]:
    """Checkpoint name → digest of what was loaded and then repacked; empty for a model that is measured as it is."""
    return getattr(model, "syncline_handed", {})
