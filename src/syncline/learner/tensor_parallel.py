"""Splits a Hugging Face model over the learner's ranks exactly as vLLM splits it over the engine's.

What is split how comes from the model's own table (`config.base_model_tp_plan`) and is done by torch's
`parallelize_module`; the embedding and the head go by rows of the vocabulary. Between the split layers every rank
holds the same activations, and every token is on every rank. What the table does not explain is an error naming it:
a layer that the engine splits and the learner does not would train other weights than are sampled from.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

from syncline.bridges.ranks import TENSOR_PARALLEL, Ranks
from syncline.errors import ConfigError
from syncline.learner.places import Gradient, Place, local, set_place
from syncline.learner.vocabulary import VocabularyParallel, padded_vocabulary

SUMMED = "replicated_with_grad_allreduce"
"""transformers' word for a parameter that every rank has and applies to its own heads."""


def parallelize(model: Any, ranks: Ranks) -> None:
    """Leaves this rank's pieces in the model, in place. Nothing is sent: every rank read the same checkpoint.

    Raises `ConfigError` naming every layer that cannot be split as the engine would.
    """
    if ranks.mesh is None:
        return
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    styles = dict(_styles(model, ranks))
    # one call a layer: as one plan, `parallelize_module` would search the model for each
    for name, style in styles.items():
        mesh = ranks.mesh[TENSOR_PARALLEL]
        parallelize_module(model.get_submodule(name), mesh, style, src_data_rank=None)  # pyright: ignore
    if tied:
        model.get_output_embeddings().weight = model.get_input_embeddings().weight
    for parameter in model.parameters():
        if isinstance(parameter, DTensor):
            piece = local(parameter)
            piece.data = piece.clone()  # a piece of whole rows is a view, which would keep the whole alive
        elif not hasattr(parameter, "place"):
            set_place(parameter, _copy(parameter, Gradient.EQUAL, ranks))


def _styles(model: Any, ranks: Ranks) -> Iterator[tuple[str, ParallelStyle]]:
    plan = _plan(model)
    vocabulary = {id(model.get_input_embeddings()), id(model.get_output_embeddings())}
    colwise = [name for name, _ in model.named_modules() if plan.get(_any_layer(name)) == "colwise"]
    inputs = {parent: _Input(users) for parent, users in Counter(name.rpartition(".")[0] for name in colwise).items()}
    faults: list[str] = []
    for name, module in model.named_modules():
        parent, planned = name.rpartition(".")[0], plan.get(_any_layer(name))
        if id(module) in vocabulary:
            planned, fault = "vocabulary", _indivisible(module, ranks)
        else:
            beside_split = parent in inputs or name in inputs
            fault = _fault(module, planned, beside_split) or _uneven(model, name, module, planned, ranks)
        if fault:
            faults.append(f"learner.tensor_parallel_size: {ranks.world_size}, but {name} {fault}")
        elif planned == "vocabulary":
            yield name, VocabularyParallel(ranks)
        elif planned == SUMMED:
            yield name, _Summed(ranks)
        elif planned == "rowwise":
            yield name, RowwiseParallel()
        elif planned == "colwise":
            heads = _key_heads(model, name, module)
            if heads is not None and heads < ranks.world_size:
                yield name, _SharedHeads(ranks, heads, inputs[parent])
            else:
                yield name, _Colwise(inputs[parent])
    if faults:
        raise ConfigError(faults)


def _plan(model: Any) -> Mapping[str, str]:
    plan = getattr(model.config, "base_model_tp_plan", None)
    if not plan:
        fault = f"model type {model.config.model_type!r} has no tensor-parallel plan in transformers; set it to 1"
        raise ConfigError([f"learner.tensor_parallel_size: {fault}"])
    return {f"{model.base_model_prefix}.{name}": style for name, style in plan.items()}


def _any_layer(name: str) -> str:
    """`model.layers.3.mlp` → `model.layers.*.mlp`, as the plans are written."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def _fault(module: nn.Module, planned: str | None, beside_split: bool) -> str | None:
    """Why this module cannot be split, as the end of a sentence about it."""
    if planned is None:
        has_own = next(module.parameters(recurse=False), None) is not None
        if isinstance(module, nn.Linear | nn.Embedding) or (has_own and beside_split):
            return "is in no plan of transformers, so nobody knows how the engine splits it; use 1, or a newer release"
        return None
    if planned not in ("colwise", "rowwise", SUMMED):
        return f"is planned as {planned!r}, which the learner cannot split as the engine does; set it to 1"
    if planned != SUMMED and type(module) is not nn.Linear:
        return f"is a {type(module).__name__}, where a plain Linear was expected; set it to 1"
    return None


def _indivisible(module: Any, ranks: Ranks) -> str | None:
    padded = padded_vocabulary(module.weight.shape[0])
    return (
        f"has {padded} padded rows, which that does not divide; choose another" if padded % ranks.world_size else None
    )


def _uneven(model: Any, name: str, module: Any, planned: str | None, ranks: Ranks) -> str | None:
    """vLLM splits by whole heads; key heads that do not go round are shared between ranks."""
    if planned not in ("colwise", "rowwise"):
        return None
    num_ranks = ranks.world_size
    heads = _key_heads(model, name, module) if planned == "colwise" else None
    if heads:
        fits = heads % num_ranks == 0 or num_ranks % heads == 0
        return None if fits else f"has {heads} heads, which neither divide nor are divided by that; choose another"
    features = module.out_features if planned == "colwise" else module.in_features
    unit = getattr(model.get_submodule(name.rpartition(".")[0]), "head_dim", 1)
    if features % (unit * num_ranks):
        return (
            f"has {features // unit} {'features' if unit == 1 else 'heads'}, which that does not divide; choose another"
        )
    return None


def _key_heads(model: Any, name: str, module: Any) -> int | None:
    """How many heads a key or value projection has, where there are fewer of them than query heads."""
    attention = model.get_submodule(name.rpartition(".")[0])
    config = model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    if not hasattr(attention, "num_key_value_groups") or heads == config.num_attention_heads:
        return None
    return heads if module.out_features == heads * attention.head_dim else None


def _copy(parameter: Tensor, gradient: Gradient, ranks: Ranks) -> Place:
    return Place(tuple(parameter.shape), (0,) * parameter.ndim, gradient, counted=ranks.is_first)


class _Summed(ParallelStyle):
    """Parameters every rank has, used on what this rank alone has: its heads."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        for parameter in module.parameters():
            set_place(parameter, _copy(parameter, Gradient.SUMMED, self._ranks))
        return module


class _Input:
    """What neighbouring column-parallel layers (query, key, value) are all applied to, as one DTensor: the gradients of
    all of them are then summed over the ranks at once."""

    def __init__(self, num_users: int) -> None:
        self._num_users = num_users
        self._left = 0
        self._held: tuple[Tensor, Tensor] | None = None

    def of(self, value: Tensor, mesh: DeviceMesh) -> Tensor:
        if self._held is None or self._held[0] is not value:
            self._held = value, DTensor.from_local(value, mesh, [Replicate()], run_check=False)
            self._left = self._num_users
        distributed = self._held[1]
        self._left -= 1
        if not self._left:
            self._held = None
        return distributed


class _Colwise(ColwiseParallel):
    def __init__(self, shared: _Input) -> None:
        super().__init__()
        self._shared = shared

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        module.register_forward_pre_hook(lambda _, inputs: self._shared.of(inputs[0], device_mesh))
        return super()._apply(module, device_mesh)


class _SharedHeads(ParallelStyle):
    """A key or value projection with fewer heads than ranks: neighbours hold the same head, as in vLLM."""

    def __init__(self, ranks: Ranks, num_heads: int, shared: _Input) -> None:
        self._ranks = ranks
        self._num_heads = num_heads
        self._shared = shared

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        copies = self._ranks.world_size // self._num_heads
        for name, whole in list(module.named_parameters(recurse=False)):
            size, first = whole.shape[0] // self._num_heads, self._ranks.rank % copies == 0
            row = self._ranks.rank // copies * size
            part = nn.Parameter(whole.detach()[row : row + size].clone(), requires_grad=whole.requires_grad)
            start = (row, *(0 for _ in whole.shape[1:]))
            set_place(part, Place(tuple(whole.shape), start, Gradient.SUMMED, counted=first))
            module.register_parameter(name, part)

        def sum_input_gradient(_: nn.Module, inputs: tuple[Tensor]) -> Tensor:
            distributed: Any = self._shared.of(inputs[0], device_mesh)
            return distributed.to_local(grad_placements=[Partial()])

        module.register_forward_pre_hook(sum_input_gradient)
        return module
