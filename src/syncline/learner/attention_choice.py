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
from syncline.learner.attention import ATTENTION, WRITTEN_OUT, packed_attention, register_attention
from syncline.learner.vision import FAMILIES

log = logging.getLogger("syncline.attention")

LENGTHS = (150, 64, 64, 3)
TOLERANCE = 0.02
"""Relative error of values and gradients: bfloat16's own is near 0.004."""


@dataclass(frozen=True, slots=True)
class _Kernel:
    package: str | None = None
    """torch's name of a FlashAttention that is a package of its own; none: torch's, which is the second."""
    module: str | None = None
    compute: Callable[..., tuple[Tensor, None]] = packed_attention


_KERNELS = {
    "flash3": _Kernel("FA3", "flash_attn_interface"),
    "flash4": _Kernel("FA4", "flash_attn.cute"),
    "flash": _Kernel(),
}
"""Fastest first."""
_FAULTS = (ImportError, RuntimeError, ValueError, TypeError, AttributeError)
"""What kernels of another build, or for another GPU, are known to fail with."""
_HAVE_SINKS = ("gpt_oss",)
"""Model types whose attention has learned sinks."""
_EXACT = ("eager", "flex_attention")
"""Names of transformers that compute sinks as they are written."""
_MASKED = ("sdpa", "eager", "flex_attention")
"""Names of transformers whose masks tell packed sequences apart by positions that are one number each."""


def choose_attention(asked: str, config: Any, *, device: torch.device, dtype: torch.dtype) -> str:
    """The `attn_implementation` for transformers: of several names, with commas between, the first that works here. A
    single one that is none of ours is left to transformers, unless the model has sinks, which kernels may drop unsaid.

    Raises `ConfigError` when the kernel asked for is absent or wrong here, saying how.
    """
    register_attention()
    *preferred, last = (name.strip() for name in asked.split(","))
    for name in preferred:
        try:
            return _chosen(name, config, device, dtype, tried=True)
        except ConfigError as error:
            log.warning("attention: %s; trying the next", error)
    return _chosen(last, config, device, dtype, tried=config.model_type in _HAVE_SINKS and last not in _EXACT)


def _chosen(asked: str, config: Any, device: torch.device, dtype: torch.dtype, *, tried: bool) -> str:
    on_gpu = device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)
    ours = asked in ("auto", *_KERNELS)
    if not on_gpu and asked != "auto" and (ours or tried):
        fault = f"{asked!r} needs a GPU and model.dtype bfloat16, not {device} and {dtype}; set it to auto"
        raise ConfigError([f"learner.attention: {fault}"])
    if not ours:
        if asked in _MASKED and (family := FAMILIES.get(config.model_type)) and family.rotates:
            whose = f"{config.model_type}, whose positions are three numbers"
            fault = f"{asked!r} lets packed sequences of {whose}, see each other"
            raise ConfigError([f"learner.attention: {fault}; set it to auto"])
        if tried and (fault := _hub_fault(asked, config, device, dtype)):
            raise ConfigError([f"learner.attention: {asked!r} cannot be used here: {fault}; set it to auto"])
        log.info("attention: %s", asked)
        return asked
    if not on_gpu:
        how = "written out" if config.model_type in _HAVE_SINKS else "sdpa"
        log.info("attention: %s, one call for each run of equally long sequences", how)
        return ATTENTION
    return _best(asked, config, device, dtype)


def _best(asked: str, config: Any, device: torch.device, dtype: torch.dtype) -> str:
    """The kernel asked for, or for `auto` the fastest that is right here."""
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
    if config.model_type in _HAVE_SINKS:
        log.warning("attention: written out, which is slow and keeps the scores of whole sequences")
        return WRITTEN_OUT
    raise ConfigError(
        ["learner.attention: no kernel works on this GPU (see the log); set it to a name of transformers"]
    )


def _hub_fault(name: str, config: Any, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a kernel of the hub, or of a package transformers knows, is not to be had or not to be trusted."""
    from transformers import AttentionInterface
    from transformers.integrations.hub_kernels import load_and_register_attn_kernel

    try:
        if "/" in name:
            load_and_register_attn_kernel(name)
        compute = AttentionInterface()[name]
        error = _error(_Kernel(compute=compute), config, device, dtype, implementation=name)
    except (*_FAULTS, OSError, KeyError) as raised:
        return f"{type(raised).__name__}: {raised}".splitlines()[0]
    return None if error < TOLERANCE else f"its relative error is {error:.2g}"


def _is_installed(kernel: _Kernel) -> bool:
    parent = kernel.module.partition(".")[0] if kernel.module else None
    return parent is None or (find_spec(parent) is not None and find_spec(str(kernel.module)) is not None)


def _fault(kernel: _Kernel, config: Any, device: torch.device, dtype: torch.dtype) -> str | None:
    from torch.nn.attention import activate_flash_attention_impl, restore_flash_attention_impl

    try:
        if kernel.package:
            activate_flash_attention_impl(kernel.package)
        error = _error(kernel, config, device, dtype)
        fault = None if error < TOLERANCE else f"its relative error is {error:.2g}"
    except _FAULTS as raised:
        fault = f"{type(raised).__name__}: {raised}".splitlines()[0]
    if fault and kernel.package:
        restore_flash_attention_impl()
    return fault


def _error(
    kernel: _Kernel, config: Any, device: torch.device, dtype: torch.dtype, *, implementation: str = ATTENTION
) -> float:
    """The largest relative error of output and gradients against float32, with the model's window and sinks if any."""
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    heads = config.num_attention_heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    generator = torch.Generator(device).manual_seed(0)
    shapes = [(1, h, sum(LENGTHS), width) for h in (heads, key_heads, key_heads)]
    has_sinks = config.model_type in _HAVE_SINKS
    shapes += [(heads,)] if has_sinks else []
    exact = [torch.randn(shape, generator=generator, device=device).to(dtype).float() for shape in shapes]
    borders = torch.tensor([0, *itertools.accumulate(LENGTHS)], dtype=torch.int32, device=device)
    told: dict[str, Any] = {"cu_seq_lens_q": borders, "max_length_q": max(LENGTHS), "scaling": width**-0.5}
    told |= {"cu_seq_lens_k": borders, "max_length_k": max(LENGTHS)}
    module = SimpleNamespace(is_causal=True, config=SimpleNamespace(_attn_implementation=implementation))

    def results(compute: Callable[..., Any], kind: torch.dtype, window: int | None) -> list[Tensor]:
        inputs = [x.to(kind).requires_grad_() for x in exact]
        sinks = {"s_aux": inputs[3]} if has_sinks else {}
        out, _ = compute(module, *inputs[:3], None, sliding_window=window, **told, **sinks)
        return [out, *torch.autograd.grad(out.float().square().sum(), inputs)]

    windows = {None, getattr(config, "sliding_window", None) if has_sinks else None}
    pairs = [
        pair
        for window in windows
        for pair in zip(
            results(kernel.compute, dtype, window), results(packed_attention, torch.float32, window), strict=True
        )
    ]
    return max(((a.float() - b).norm() / b.norm()).item() for a, b in pairs)
