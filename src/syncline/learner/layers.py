"""How a model's layers run: what of them is kept for the backward pass, and whether torch compiles them.

A compiled layer has its norms, rotations and gated activations fused into a few kernels, which of what they computed
keep no more than is cheaper to keep than to compute again. All layers of a model share one compilation, made for any
number of tokens and sequences, so packed micro-batches never wait for another one. What is computed again is part of
that compilation: of a layer's forward pass the backward pass holds only what it needs, never the last product.
"""

from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from transformers.modeling_layers import GradientCheckpointingLayer

from syncline.config.schema import Recomputation
from syncline.errors import ConfigError


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The transformer layers, first to last. Raises `ConfigError` for a model in which transformers marks none."""
    layers: list[nn.Module] = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        fault = (
            f"{type(model).__name__} marks no layers; set learner.recomputation.what to none, learner.compile to off"
        )
        raise ConfigError([f"model.path: {fault}"])
    return layers


def recompute_layers(model: nn.Module, asked: Recomputation) -> None:
    """Makes every `asked.every`-th layer compute again in the backward pass what `asked.what` says is not kept."""
    if asked.what == "none":
        return
    again: Callable[..., Any] = partial(checkpoint, use_reentrant=False, preserve_rng_state=_draws(model))
    if asked.what != "full":
        kept = _attention() if asked.what == "attention" else [*_products(), *_attention()]
        again = partial(again, context_fn=partial(create_selective_checkpoint_contexts, kept))
    for i, layer in enumerate(decoder_layers(model)):
        layer._gradient_checkpointing_func = again  # pyright: ignore[reportArgumentType]
        layer.gradient_checkpointing = i % asked.every == 0  # pyright: ignore[reportArgumentType]


def train_as_sampled(model: nn.Module) -> nn.Module:
    """The model, in training mode where layers may be computed again and an adapter may draw its dropout. All else runs
    as the engine runs it: some families add noise while they train, or draw the experts that a token goes to."""
    model.train()
    for name, module in model.named_modules():
        of_adapter = "lora_" in name or hasattr(module, "lora_A")
        if name and not of_adapter and not isinstance(module, GradientCheckpointingLayer):
            module.training = False
    return model


def _draws(model: nn.Module) -> bool:
    return any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules())


def _products() -> list[Any]:
    return [torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default]


def _attention() -> list[Any]:
    """Operators whose results include an attention's output."""
    from torch.nn.attention import varlen

    aten = torch.ops.aten
    return [
        varlen._varlen_attn._opoverload,  # torch's custom operator
        aten._flash_attention_forward.default,
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default,
        aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_cudnn_attention.default,
    ]


def compile_layers(model: nn.Module, *, backend: str = "inductor") -> None:
    """Has torch compile each layer, and the norm after them, at the first call. The weights stay where they are. A
    vision tower, whose work differs with every picture's shape, is left as it is.

    A layer that draws random numbers (an adapter's dropout) is computed again from outside of its compilation.
    """
    decoder: Any = model.get_decoder() if hasattr(model, "get_decoder") else model  # pyright: ignore[reportCallIssue]
    inside = not _draws(decoder)
    for layer in decoder_layers(decoder):
        if inside and layer.gradient_checkpointing:
            layer.gradient_checkpointing = False  # pyright: ignore[reportArgumentType]
            again = MethodType(_computed_again, layer)
            layer.forward = torch.compile(again, dynamic=True, backend=backend)
        else:
            layer.compile(dynamic=True, backend=backend)
    for norm in _last_norm(model):
        norm.compile(dynamic=True, backend=backend)


def _computed_again(layer: Any, *args: Any, **kwargs: Any) -> Any:
    """The layer's forward as the compiler is to see it: with the recomputation in it, which it then plans itself, and
    without FSDP's hooks, which it would refuse to have in that."""
    return layer._gradient_checkpointing_func(type(layer).forward, layer, *args, **kwargs)


def _last_norm(model: Any) -> list[nn.Module]:
    norm = getattr(model.get_decoder(), "norm", None) if hasattr(model, "get_decoder") else None
    return [norm] if isinstance(norm, nn.Module) else []
