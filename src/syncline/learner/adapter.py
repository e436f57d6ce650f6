"""A PEFT model as the `lora` bridge sees it: the frozen base, and the adapted layers.

vLLM adds B·A·x of plain linear layers and nothing else, so whatever else an adapter may train (DoRA's magnitudes,
embeddings, biases, whole modules) is refused by name here, before a token is sampled without it.
"""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from syncline.bridges.adapter import LoraLayer, listed
from syncline.errors import SyncError
from syncline.learner.model import causal_lm, trainable_parameters
from syncline.learner.places import gathered


def base_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The parameters under the adapter, by their checkpoint names, tied ones once; gathered where ranks have parts."""
    for name, parameter in causal_lm(model).named_parameters():
        if "lora_" not in name:
            yield name.replace(".base_layer.", "."), gathered(parameter)


def adapter_layers(model: nn.Module) -> Iterator[tuple[str, LoraLayer]]:
    """Each adapted layer by its name in the checkpoint, gathered where ranks have parts.

    Raises `SyncError` naming what is trained beside them.
    """
    layers = {name: layer for name, module in causal_lm(model).named_modules() if (layer := _plain_lora(module))}
    pairs = {id(tensor) for layer in layers.values() for tensor in (layer.a, layer.b)}
    others = [name for name, parameter in trainable_parameters(model) if id(parameter) not in pairs]
    if others or not layers:
        raise SyncError(
            "vLLM serves LoRA pairs of linear layers alone; train without what follows, or set bridge.name to "
            f"restart, which merges DoRA and biases:\n{listed(others or ['the model has no LoRA layer'])}"
        )
    for name, layer in layers.items():
        yield name, LoraLayer(gathered(layer.a), gathered(layer.b), layer.scaling)


def _plain_lora(module: Any) -> LoraLayer | None:
    """The layer's one active pair; `None` for any other module, and for LoRA that is not of a linear layer."""
    from peft.tuners.lora import Linear

    if not isinstance(module, Linear) or len(module.active_adapters) != 1:
        return None
    [adapter] = module.active_adapters
    if adapter not in module.lora_A:
        return None
    scaling: float = module.scaling[adapter]
    return LoraLayer(module.lora_A[adapter].weight, module.lora_B[adapter].weight, scaling)  # pyright: ignore
