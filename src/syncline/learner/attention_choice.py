"""Which attention kernel a model is trained with: the one asked for, or the fastest this machine has.

Nothing is trusted by its name: every candidate computes a small packed batch, forward and backward, in the model's own
shape, and is compared with plain float32 attention before the first step.
"""

import itertools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from syncline.errors import ConfigError
from syncline.learner.attention import ATTENTION, packed_attention, register_attention

log = logging.getLogger("syncline.attention")

LENGTHS = (150, 64, 64, 3)
TOLERANCE = 0.02
"""Relative error of values and gradients: bfloat16's own is near 0.004."""


@dataclass(frozen=True, slots=True)
class _Kernel:
    library: str | None = None
    """torch's name of a FlashAttention that is a package of its own; none: torch's, which is the second."""
    module: str | None = None
    compute: Callable[..., tuple[Tensor, None]] = packed_attention


_KERNELS = {
    "flash3": _Kernel("FA3", "flash_attn_interface"),
    "flash4": _Kernel("FA4", "flash_attn.cute"),
    "flash": _Kernel(),
}
"""Fastest first."""
_FAULTS = (ImportError, RuntimeError, ValueError, TypeError, AttributeError, NotImplementedError)
"""What kernels of another build, or for another GPU, are known to fail with."""


def choose_attention(asked: str, config: Any, *, device: torch.device, dtype: torch.dtype) -> str:
    """The `attn_implementation` for transformers. A name that is none of ours is left to transformers.

    Raises `ConfigError` when the kernel asked for is absent or wrong here, saying how.
    """
    register_attention()
    if asked not in ("auto", *_KERNELS):
        return asked
    on_gpu = device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)
    if not on_gpu and asked in _KERNELS:
        fault = f"{asked!r} needs a GPU and model.dtype bfloat16, not {device} and {dtype}; set it to auto"
        raise ConfigError([f"learner.attention: {fault}"])
    if not on_gpu:
        log.info("attention: sdpa, one call for each run of equally long sequences")
        return ATTENTION
    for name in _KERNELS if asked == "auto" else (asked,):
        if asked == "auto" and not _is_installed(_KERNELS[name]):
            continue
        fault = _fault(_KERNELS[name], config, device, dtype)
        if fault is None:
            log.info("attention: %s", name)
            return ATTENTION
        if asked != "auto":
            raise ConfigError([f"learner.attention: {name!r} does not work here: {fault}; set it to auto"])
        log.warning("attention: %s is left out: %s", name, fault)
    raise ConfigError(
        ["learner.attention: no kernel works on this GPU (see the log); set it to a name of transformers"]
    )


def _is_installed(kernel: _Kernel) -> bool:
    parent = kernel.module.partition(".")[0] if kernel.module else None
    return parent is None or (find_spec(parent) is not None and find_spec(str(kernel.module)) is not None)


def _fault(kernel: _Kernel, config: Any, device: torch.device, dtype: torch.dtype) -> str | None:
    from torch.nn.attention import activate_flash_attention_impl, restore_flash_attention_impl

    try:
        if kernel.library:
            activate_flash_attention_impl(kernel.library)
        error = _error(kernel, config, device, dtype)
        fault = None if error < TOLERANCE else f"its relative error is {error:.2g}"
    except _FAULTS as raised:
        fault = f"{type(raised).__name__}: {raised}".splitlines()[0]
    if fault and kernel.library:
        restore_flash_attention_impl()
    return fault


def _error(kernel: _Kernel, config: Any, device: torch.device, dtype: torch.dtype) -> float:
    """The largest relative error of output and gradients against float32."""
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    heads = config.num_attention_heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    generator = torch.Generator(device).manual_seed(0)
    shapes = [(1, h, sum(LENGTHS), width) for h in (heads, key_heads, key_heads)]
    exact = [torch.randn(shape, generator=generator, device=device).to(dtype).float() for shape in shapes]
    borders = torch.tensor([0, *itertools.accumulate(LENGTHS)], dtype=torch.int32, device=device)
    told = {"cu_seq_lens_q": borders, "max_length_q": max(LENGTHS), "scaling": width**-0.5}
    results = []
    tried: list[tuple[Callable[..., Any], torch.dtype]] = [(kernel.compute, dtype), (packed_attention, torch.float32)]
    for compute, kind in tried:
        inputs = [x.to(kind).requires_grad_() for x in exact]
        out, _ = compute(SimpleNamespace(is_causal=True), *inputs, None, **told)
        results.append([out, *torch.autograd.grad(out.float().square().sum(), inputs)])
    return max(((a.float() - b).norm() / b.norm()).item() for a, b in zip(*results, strict=True))
