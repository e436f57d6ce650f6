"""One rank's pieces of vLLM's parameters, under their checkpoint names: fused layers split, padding left out.

The map comes from vLLM's own tables (`packed_modules_mapping`, each layer's partition sizes, rank and shard indices),
not from a list of model families; a parameter they do not explain is an error naming it.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from syncline.bridges.manifest import Shard
from syncline.bridges.receipt import whole
from syncline.bridges.repacked import is_repacked
from syncline.engines.vllm.experts import expert_pieces
from syncline.engines.vllm.names import CheckpointNames
from syncline.engines.vllm.packed_experts import is_packed, repacked_pieces
from syncline.engines.vllm.packed_layers import is_packed_layer, packed_layer_pieces
from syncline.errors import SyncError

Pieces = Iterator[tuple[str, Shard]]
CACHE_SCALES = frozenset({"_q_scale", "_k_scale", "_v_scale"})
"""Of a quantised KV cache: buffers of vLLM's, which 0.26 makes parameters of where compressed-tensors packs the layers.
No checkpoint that has any of its own is taken (`config.model_folder`)."""


def checkpoint_views(model: Any) -> Pieces:
    """This rank's piece of each checkpoint parameter, a view of vLLM's memory. Tied parameters come once, under their
    first name; one that is fused in the checkpoint and split over ranks comes once a piece.

    Raises `SyncError` naming a parameter that vLLM keeps in a layout of its own.
    """
    from vllm.distributed import get_tensor_model_parallel_rank

    names = CheckpointNames(model)
    rank = get_tensor_model_parallel_rank()
    for name, module, parameter in _parameters(model):
        for piece, shard in _pieces(name, module, parameter, names.packed):
            is_whole = tuple(shard.tensor.shape) == shard.shape
            own = piece if is_repacked(piece) else names.of(piece, name)
            yield own, replace(shard, counted=rank == 0) if is_whole else shard


def refuse_copies(model: Any) -> None:
    """Raises `SyncError` naming a parameter that vLLM computed from others after loading and reads in their place: a
    write to the others in place does not reach it."""
    storages = {parameter.untyped_storage().data_ptr() for _, _, parameter in _parameters(model)}
    for prefix, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            if _is_derived(module) and parameter.untyped_storage().data_ptr() not in storages:
                raise SyncError(
                    f"{prefix}.{leaf} is vLLM's own copy of other weights, which a write in place would leave old; use "
                    "bridge.name restart"
                )


def _parameters(model: Any) -> Iterator[tuple[str, Any, torch.nn.Parameter]]:
    """(name, the module that owns it, parameter), tied ones once, those vLLM derived from others left out."""
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in seen and leaf not in CACHE_SCALES and not _is_derived(module):
                seen.add(id(parameter))
                yield f"{prefix}.{leaf}".replace(".base_layer.", "."), module, parameter


def _is_derived(module: Any) -> bool:
    """Multi-head latent attention keeps `kv_b_proj` a second time, head by head."""
    from vllm.model_executor.layers.attention import MLAAttention

    return isinstance(module, MLAAttention)


def _pieces(name: str, module: Any, parameter: torch.nn.Parameter, packed: dict[str, list[str]]) -> Pieces:
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
    from vllm.model_executor.layers.linear import ColumnParallelLinear, RowParallelLinear
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    tensor = parameter.data
    if isinstance(module, VocabParallelEmbedding):
        yield name, _vocabulary(name, tensor, module)
    elif is_packed_layer(module):
        yield from packed_layer_pieces(name, tensor, module)
    elif isinstance(module, RoutedExperts) and is_packed(module):
        yield from repacked_pieces(name, tensor, module)
    elif isinstance(module, RoutedExperts):
        yield from expert_pieces(name, tensor, module)
    elif isinstance(module, ColumnParallelLinear):
        _refuse_own_loader(name, module)
        yield from _columns(name, tensor, module, packed)
    elif isinstance(module, RowParallelLinear) and tensor.dim() > 1:
        _refuse_own_loader(name, module)
        yield name, _rows(name, tensor, module)
    elif name.endswith(".sinks"):
        yield name, _heads(tensor)
    else:
        _refuse_unknown_split(name, module, parameter)
        yield name, whole(tensor)


def _heads(tensor: torch.Tensor) -> Shard:
    """A number for each of this rank's attention heads."""
    from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size

    rank, ranks = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
    return Shard(tensor, (len(tensor) * ranks,), (len(tensor) * rank,))


def _vocabulary(name: str, tensor: torch.Tensor, module: Any) -> Shard:
    """Rows `[start, end)` of the vocabulary; what pads them to equal sizes on every rank is left out."""
    if module.num_embeddings != module.org_vocab_size:
        raise SyncError(f"{name}: vLLM adds {module.num_embeddings - module.org_vocab_size} rows to the vocabulary")
    indices = module.shard_indices
    start, end = indices.org_vocab_start_index, indices.org_vocab_end_index
    return _slice(tensor[: end - start], start, module.org_vocab_size)


def _rows(name: str, tensor: torch.Tensor, module: Any) -> Shard:
    """A row-parallel layer holds columns of its matrix."""
    size = module.input_size_per_partition
    if tensor.shape[1] != size or size * module.tp_size != module.input_size:
        raise SyncError(f"{name}: vLLM splits {module.input_size} columns into {list(tensor.shape)}")
    return Shard(tensor, (tensor.shape[0], module.input_size), (0, module.tp_rank * size))


@dataclass(frozen=True, slots=True)
class Part:
    """One of the matrices that a column-parallel layer fuses: which rows of it this rank holds."""

    num_rows: int
    start: int
    total_rows: int
    counted: bool


def row_parts(module: Any) -> list[Part]:
    """Key and value heads are replicated when there are fewer of them than ranks."""
    sizes = list(module.output_partition_sizes)
    replicas = [1] * len(sizes)
    if hasattr(module, "num_kv_head_replicas"):
        replicas[1:] = [module.num_kv_head_replicas] * (len(sizes) - 1)
    rank, ranks = module.tp_rank, module.tp_size
    return [
        Part(size, rank // copies * size, size * ranks // copies, rank % copies == 0)
        for size, copies in zip(sizes, replicas, strict=True)
    ]


def _columns(name: str, tensor: torch.Tensor, module: Any, packed: dict[str, list[str]]) -> Pieces:
    """A column-parallel layer holds rows of its matrices, one matrix after the other."""
    *path, layer, leaf = name.split(".")
    names, parts = packed.get(layer, [layer]), row_parts(module)
    if sum(part.num_rows for part in parts) != tensor.shape[0] or len(names) not in (1, len(parts)):
        raise SyncError(
            f"{name}: vLLM fuses {names} into a tensor of shape {list(tensor.shape)}, which its partition sizes "
            f"{[part.num_rows for part in parts]} do not explain"
        )
    if len(names) == 1 and module.tp_size == 1:
        yield name, whole(tensor)
        return
    pieces = tensor.split([part.num_rows for part in parts])
    if len(names) == len(parts):
        for own, piece, part in zip(names, pieces, parts, strict=True):
            yield ".".join((*path, own, leaf)), _slice(piece, part.start, part.total_rows, part.counted)
        return
    total, above = sum(part.total_rows for part in parts), 0
    for piece, part in zip(pieces, parts, strict=True):  # the checkpoint fuses them too
        yield name, _slice(piece, above + part.start, total, part.counted)
        above += part.total_rows


def _slice(piece: torch.Tensor, start: int, total_rows: int, counted: bool = True) -> Shard:
    rest = tuple(piece.shape[1:])
    return Shard(piece, (total_rows, *rest), (start, *(0 for _ in rest)), counted)


def _refuse_own_loader(name: str, module: Any) -> None:
    """A layer of a model's own may split its rows over ranks as it likes; only its loader knows how."""
    from vllm.model_executor.layers import linear

    known = (
        linear.ColumnParallelLinear,
        linear.MergedColumnParallelLinear,
        linear.QKVParallelLinear,
        linear.RowParallelLinear,
    )
    if module.tp_size > 1 and type(module).weight_loader not in {layer.weight_loader for layer in known}:
        raise SyncError(
            f"{name}: {type(module).__name__} splits its weights over ranks in a way of its own; set "
            "engine.tensor_parallel_size to 1"
        )


def _refuse_unknown_split(name: str, module: Any, parameter: torch.nn.Parameter) -> None:
    from vllm.distributed import get_tensor_model_parallel_world_size
    from vllm.model_executor.layers.linear import LinearBase

    loads_itself = hasattr(parameter, "weight_loader") and not isinstance(module, LinearBase)
    if loads_itself and get_tensor_model_parallel_world_size() > 1:
        raise SyncError(
            f"{name}: {type(module).__name__} may split it over ranks, and vLLM has no table that says how; set "
            "engine.tensor_parallel_size to 1"
        )
