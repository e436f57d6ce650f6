"""Causal attention over sequences laid end to end, as a transformers attention function.

No token attends across a sequence's border, nothing is padded and no T x T mask exists. On a GPU in half precision
torch's variable-length FlashAttention does the work: 2, or another that `attention_choice` put in its place. Elsewhere
one SDPA call does for each run of equally long sequences (`packing` puts the longest first, so equal lengths are
neighbours). Neither caps its scores, so the attention of Gemma 2 is written out for each run, and so are the learned
sinks of GPT-OSS, but on a GPU in half precision (`sinks`). What none can do is refused by name.
"""

import inspect
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedConfig

from syncline.bridges.saved import model_class
from syncline.errors import ConfigError
from syncline.learner.sinks import attention_with_sinks

ATTENTION = "syncline_varlen"
WRITTEN_OUT = "syncline_written_out"
"""The same on any device, without a kernel that knows packed sequences: memory for the scores of each one whole."""


def register_attention() -> str:
    """Makes `attn_implementation=ATTENTION` known to transformers, and returns `ATTENTION`.

    Registering twice is harmless. A mask of its own it has none: for one, transformers would ask the GPU at each
    micro-batch whether its sequences are packed, and wait for all that was queued before.
    """
    AttentionInterface.register(ATTENTION, packed_attention)
    AttentionInterface.register(WRITTEN_OUT, written_out_attention)
    return ATTENTION


def check_attention(config: PreTrainedConfig) -> None:
    """Raises `ValueError` naming what in a (text) model's configuration packed sequences would silently get wrong."""
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds:
        raise ValueError(
            f"model type {config.model_type!r} has layers of type {sorted(kinds)}, whose state would run "
            "from one packed sequence into the next; only full_attention and sliding_attention can be packed"
        )
    if getattr(config, "attention_chunk_size", None) is not None:
        raise ValueError(f"model type {config.model_type!r} uses chunked attention, which {ATTENTION} cannot do")


def refuse_own_attention(config: PreTrainedConfig) -> None:
    """Raises `ValueError` for a family that computes attention itself, and so asks no attention function of ours: it
    would see across the borders, and without a mask into the future."""
    family = model_class(config)._model_mapping.get(type(config), None)
    if not getattr(family, "_supports_attention_backend", True):
        raise ValueError(
            f"model type {config.model_type!r} computes attention by itself, which knows no packed sequences; choose "
            "another model, or set learner.attention to eager, which the parity check then proves or refuses"
        )


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """`query` [1, Hq, T, D], `key` and `value` [1, Hkv, T, D] to ([1, T, Hq, D], None).

    The borders come from transformers' FlashAttention keywords: `cu_seq_lens_q` [S + 1] int32 and `max_length_q`.
    """
    half = query.is_cuda and query.dtype in (torch.float16, torch.bfloat16)
    if not half or kwargs.get("softcap") is not None:
        return written_out_attention(module, query, key, value, attention_mask, **kwargs)
    _refuse_unsupported(module, query, attention_mask, kwargs)
    borders, longest = kwargs["cu_seq_lens_q"], kwargs["max_length_q"]
    how = {"window": kwargs.get("sliding_window"), "scale": kwargs.get("scaling")}
    if (sinks := kwargs.get("s_aux")) is not None:
        return attention_with_sinks(query, key, value, sinks, borders, longest, **how), None
    return _flash(query, key, value, borders, longest, **how), None


def written_out_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """As `packed_attention`, one run of equally long sequences after the other."""
    _refuse_unsupported(module, query, attention_mask, kwargs)
    out = _by_runs(
        query,
        key,
        value,
        kwargs["cu_seq_lens_q"].tolist(),
        window=kwargs.get("sliding_window"),
        scale=kwargs.get("scaling"),
        softcap=kwargs.get("softcap"),
        sinks=kwargs.get("s_aux"),
    )
    return out, None


def _refuse_unsupported(
    module: nn.Module, query: Tensor, attention_mask: Tensor | None, kwargs: dict[str, Any]
) -> None:
    asked = {
        "an attention mask": attention_mask is not None,
        "attention that is not causal": not kwargs.get("is_causal", getattr(module, "is_causal", True)),
        "attention dropout": kwargs.get("dropout", 0.0) != 0.0,
        "attention sinks (s_aux) and capped scores": None not in (kwargs.get("s_aux"), kwargs.get("softcap")),
        "a position bias": kwargs.get("position_bias") is not None,
        "output_attentions": bool(kwargs.get("output_attentions")),
        "a batch dimension above 1": query.shape[0] != 1,
        "a call without cu_seq_lens_q": kwargs.get("cu_seq_lens_q") is None,
        "a call without max_length_q": kwargs.get("max_length_q") is None,
    }
    refused = [name for name, wanted in asked.items() if wanted]
    if refused:
        fault = f"{type(module).__name__} asks for what {ATTENTION} attention cannot do: {', '.join(refused)}"
        raise ConfigError([f"model.path: {fault}; choose another model, or set learner.attention to eager"])


def _flash(
    query: Tensor, key: Tensor, value: Tensor, borders: Tensor, longest: int, *, window: int | None, scale: float | None
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    # torch 2.11 shares key heads between query heads unasked; later versions want to be told.
    told: dict[str, Any] = {}
    if query.shape[1] != key.shape[1] and "enable_gqa" in inspect.signature(varlen_attn).parameters:
        told["enable_gqa"] = True
    width = value.shape[-1]  # latent attention's values are narrower than its keys; the kernel wants one width
    out: Any = varlen_attn(
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        pad(value[0], (0, query.shape[-1] - width)).transpose(0, 1),
        borders,
        borders,
        longest,
        longest,
        scale=scale,
        window_size=(-1 if window is None else window - 1, 0),
        **told,
    )
    return out[..., :width].unsqueeze(0)


def _by_runs(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    borders: list[int],
    *,
    window: int | None,
    scale: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    outputs = []
    for start, count, length in _equal_runs(borders):
        rows = slice(start, start + count * length)
        q, k, v = (_as_batch(x, rows, count) for x in (query, key, value))
        seen = None if window is None or length <= window else window
        if softcap is None and sinks is None:
            out = _sdpa(q, k, v, window=seen, scale=scale)
        else:
            out = _written_out(q, k, v, window=seen, scale=scale, softcap=softcap, sinks=sinks)
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs).unsqueeze(0)


def _sdpa(query: Tensor, key: Tensor, value: Tensor, *, window: int | None, scale: float | None) -> Tensor:
    mask = None if window is None else _window_mask(query.shape[2], window, query.device)
    return scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def _written_out(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    window: int | None,
    scale: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Scores become `softcap * tanh(scores / softcap)` before the mask (Gemma 2, arXiv 2408.00118, section 2). A sink
    is one more score a head, of a key whose value is nothing (GPT-OSS, arXiv 2508.10925, section 2.2)."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    scores = (query @ key.transpose(-1, -2)).float() * (query.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    length = query.shape[2]
    seen = _window_mask(length, length if window is None else window, query.device)
    scores = scores.masked_fill(~seen, float("-inf"))
    if sinks is not None:
        column = sinks.float()[None, :, None, None].expand(*scores.shape[:-1], 1)
        return torch.cat([scores, column], dim=-1).softmax(-1)[..., :-1].to(value.dtype) @ value
    return scores.softmax(-1).to(value.dtype) @ value


def _as_batch(x: Tensor, rows: slice, count: int) -> Tensor:
    """`[1, H, T, D]`, of which `rows` are `count` sequences of one length, to `[count, H, length, D]`."""
    return x[0, :, rows].unflatten(1, (count, -1)).transpose(0, 1)


def _equal_runs(borders: list[int]) -> Iterator[tuple[int, int, int]]:
    """(first row, number of sequences, length) of each run of neighbours of one length."""
    lengths = [end - start for start, end in itertools.pairwise(borders)]
    start = 0
    for length, run in itertools.groupby(lengths):
        count = sum(1 for _ in run)
        yield start, count, length
        start += count * length


def _window_mask(length: int, window: int, device: torch.device) -> Tensor:
    """`[length, length]` bool: position i sees the `window` positions up to and including itself."""
    seen = torch.ones(length, length, dtype=torch.bool, device=device)
    return seen.tril_().triu_(1 - window)
