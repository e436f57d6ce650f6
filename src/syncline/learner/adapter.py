"""A PEFT model as the `lora` bridge sees it: the frozen base, and the adapted layers.

vLLM adds B·A·x of plain linear layers and of fused experts and nothing else, so whatever else an adapter may train
(DoRA's magnitudes, embeddings, biases, whole modules) is refused by name here, before a token is sampled without it.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from syncline.bridges.adapter import LoraLayer, listed
from syncline.bridges.lora import Base, Stored
from syncline.config.model_folder import MXFP4, quantisation
from syncline.errors import SyncError
from syncline.learner.expert_adapter import expert_pair, is_expert_lora
from syncline.learner.model import causal_lm, trainable_parameters
from syncline.learner.mxfp4 import is_expert, stored_experts
from syncline.learner.packed import names_of_packed, stored_layers
from syncline.learner.places import gathered

EXPERT_DIM = 3
OTHER = {"gate_up_proj": "down_proj", "down_proj": "gate_up_proj"}


def base_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The parameters under the adapter, by their checkpoint names, tied ones once; gathered where ranks have parts."""
    for name, parameter in causal_lm(model).named_parameters():
        if "lora_" not in name:
            yield name.replace(".base_layer", ""), gathered(parameter)


def plain_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """As `base_parameters`, without the experts, of a base whose experts an engine keeps in another form."""
    return ((name, parameter) for name, parameter in base_parameters(model) if not is_expert(name))


def frozen_base(folder: Path) -> tuple[Base, Stored]:
    """Of a model from the checkpoint in `folder`: the parameters that an engine has as the learner does, and the
    digests of what it keeps in a packing of its own."""
    packing = quantisation(str(folder))
    if packing is None:
        return base_parameters, lambda model: {}
    if packing == MXFP4:
        return plain_parameters, lambda model: stored_experts(dict(base_parameters(model)), folder)
    layers = names_of_packed(folder)

    def unpacked(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        return ((name, p) for name, p in base_parameters(model) if name.rpartition(".")[0] not in layers)

    return unpacked, lambda model: stored_layers(base_parameters(model), folder)


class AdapterLayers:
    """Each adapted layer of a model by its name in the checkpoint, gathered where ranks have parts.

    Raises `SyncError` naming what is trained beside them. Which modules are adapted is noted for as long as their
    adapters are the same ones: to look through those of a 7B takes longer than to send its adapter.
    """

    def __init__(self) -> None:
        self._model: nn.Module | None = None
        self._adapted: dict[str, _Adapted] = {}

    def __call__(self, model: nn.Module) -> Iterator[tuple[str, LoraLayer]]:
        if model is not self._model or any(one.module.active_adapter != one.active for one in self._adapted.values()):
            named = causal_lm(model).named_modules()
            found = ((_name(name, module), module, _pair(module)) for name, module in named)
            adapted = {name: _Adapted(module, module.active_adapter, pair) for name, module, pair in found if pair}
            _refuse_others(model, {name: one.pair() for name, one in adapted.items()})
            self._model, self._adapted = model, adapted
        for name, one in self._adapted.items():
            a, b, scaling = one.pair()
            yield name, LoraLayer(gathered(a), gathered(b), scaling)


class _Adapted(NamedTuple):
    module: Any
    active: str | list[str]
    """Its `active_adapter` when it was found."""
    pair: Callable[[], LoraLayer]
    """As it is when asked."""


def _refuse_others(model: nn.Module, layers: dict[str, LoraLayer]) -> None:
    _refuse_half_adapted_experts(layers)
    tensors = [tensor for layer in layers.values() for tensor in (layer.a, layer.b)]
    pairs = {id(tensor._base if tensor.dim() == EXPERT_DIM else tensor) for tensor in tensors}
    others = [name for name, parameter in trainable_parameters(model) if id(parameter) not in pairs]
    if others or not layers:
        raise SyncError(
            "vLLM serves LoRA pairs of linear layers alone; train without what follows, or set bridge.name to "
            f"restart, which merges DoRA and biases:\n{listed(others or ['the model has no LoRA layer'])}"
        )


def _pair(module: Any) -> Callable[[], LoraLayer] | None:
    """Reads the layer's one active pair; `None` for any other module, and for LoRA that is not of a linear layer."""
    from peft.tuners.lora import Linear

    if is_expert_lora(module):
        return lambda: LoraLayer(*expert_pair(module))
    if not isinstance(module, Linear) or len(module.active_adapters) != 1:
        return None
    [adapter] = module.active_adapters
    a, b, scaling = module.lora_A, module.lora_B, module.scaling
    if adapter not in a:
        return None
    return lambda: LoraLayer(a[adapter].weight, b[adapter].weight, scaling[adapter])  # pyright: ignore


def _name(name: str, module: Any) -> str:
    """Of a layer, or of the parameter that PEFT's wrapper around its module adapts, as the checkpoint has it."""
    return f"{name.replace('.base_layer', '')}.{module.parameter_name}" if is_expert_lora(module) else name


def _refuse_half_adapted_experts(layers: dict[str, LoraLayer]) -> None:
    """vLLM's layer of fused experts takes the pairs of both of their matrices, or none."""
    experts = {name for name, layer in layers.items() if layer.a.dim() == EXPERT_DIM}
    for name in experts:
        parent, _, leaf = name.rpartition(".")
        other = f"{parent}.{OTHER[leaf]}" if leaf in OTHER else None
        if other not in experts:
            raise SyncError(
                f"{name}: vLLM serves adapters of both matrices of the experts; add {other or 'the other'} to "
                "model.lora.target_parameters, or set bridge.name to restart"
            )
