"""How a model's layers run: what of them is kept for the backward pass, and whether torch compiles them.

A compiled layer has its norms, rotations and gated activations fused into a few kernels, which of what they computed
keep no more than is cheaper to keep than to compute again. All layers of a model share one compilation, made for any
number of tokens and sequences, so packed micro-batches never wait for another one.
"""

from collections.abc import Callable
from functools import partial
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
    kept = {"context_fn": partial(create_selective_checkpoint_contexts, _kept_results())}
    draws = any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules())
    again: Callable[..., Any] = partial(
        checkpoint, use_reentrant=False, preserve_rng_state=draws, **(kept if asked.what == "selective" else {})
    )
    for i, layer in enumerate(decoder_layers(model)):
        layer._gradient_checkpointing_func = again  # pyright: ignore[reportArgumentType]
        layer.gradient_checkpointing = i % asked.every == 0  # pyright: ignore[reportArgumentType]


def _kept_results() -> list[Any]:
    """Of `selective`: matrix products and attention. Norms, rotations, activations are computed again."""
    from torch.nn.attention import varlen

    aten = torch.ops.aten
    attention = [
        varlen._varlen_attn._opoverload,  # torch's custom operator
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default,
        aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_cudnn_attention.default,
    ]
    return [aten.mm.default, aten.addmm.default, aten.bmm.default, *attention]


def compile_layers(model: nn.Module, *, backend: str = "inductor") -> None:
    """Has torch compile each layer, and the norm after them, at the first call. The weights stay where they are. A
    vision tower, whose work differs with every picture's shape, is left as it is."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model  # pyright: ignore[reportCallIssue]
    for module in (*decoder_layers(decoder), *_last_norm(model)):  # pyright: ignore[reportArgumentType]
        module.compile(dynamic=True, backend=backend)


def _last_norm(model: Any) -> list[nn.Module]:
    norm = getattr(model.get_decoder(), "norm", None) if hasattr(model, "get_decoder") else None
    return [norm] if isinstance(norm, nn.Module) else []
