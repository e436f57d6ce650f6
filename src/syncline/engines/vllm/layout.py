"""vLLM's parameters under their checkpoint names: fused layers split, vocabulary padding left out.

The map comes from vLLM's own tables (`packed_modules_mapping`, each layer's partition sizes), not from a list of
model families; a parameter it cannot explain is an error naming it.
"""

from collections.abc import Iterator
from typing import Any

import torch

from syncline.errors import SyncError


def checkpoint_views(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Each checkpoint parameter once, as a view of vLLM's memory. Tied parameters come under their first name."""
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    packed = getattr(model, "packed_modules_mapping", {})
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            name = f"{prefix}.{leaf}".replace(".base_layer.", ".")
            if isinstance(module, VocabParallelEmbedding):
                yield name, parameter.data[: module.org_vocab_size]
            else:
                yield from _split(name, parameter.data, module, packed)


def _split(
    name: str, tensor: torch.Tensor, module: Any, packed: dict[str, list[str]]
) -> Iterator[tuple[str, torch.Tensor]]:
    *path, layer, leaf = name.split(".")
    parts = packed.get(layer, [layer])
    if len(parts) == 1:
        yield name, tensor
        return
    sizes = getattr(module, "output_partition_sizes", None)
    if sizes is None or len(sizes) != len(parts) or sum(sizes) != tensor.shape[0]:
        raise SyncError(
            f"{name}: vLLM fuses {parts} into a tensor of shape {list(tensor.shape)}, which its partition sizes "
            f"{sizes} do not explain"
        )
    for part, rows in zip(parts, tensor.split(list(sizes)), strict=True):
        yield ".".join((*path, part, leaf)), rows
