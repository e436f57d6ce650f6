"""What a run needs, before it is started: bytes a part of learner and engine, and seconds a step.

Every line says its formula. What formulas cannot say is measured, on H200s (docs/log.md): the share of the products'
rate that the learner reaches, torch's own overhead, what a decoding step takes beside reading memory. Estimates are of
bfloat16 weights on GPUs, completions of full length.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from syncline.config.eight_bits import bytes_per_element
from syncline.config.schema import RunConfig
from syncline.launch.shape import Shape

GPUS = {"h200": (141e9, 795e12, 4.8e12), "h100": (80e9, 795e12, 3.35e12), "a100": (80e9, 250e12, 2.0e12)}
"""Name → (bytes, products a second as measured or four fifths of the data sheet, bytes read a second)."""
ALLOCATOR = 1.02
"""torch reserves more than it hands out: 68.1 of 66.6 GB, 76.4 of 75.5 GB."""
SHARE_OF_RATE = ((0.5e9, 0.49), (1.5e9, 0.63), (7.6e9, 0.73))
"""Parameters → share of the products' rate that forward and backward reach, everything kept."""
RECOMPUTED = 0.77
"""Of that share, with layers computed again."""
_KEPT = {"selective": (2, 2, 1, 2), "attention": (1, 1, 0, 0), "full": (1, 0, 0, 0)}
"""`recomputation.what` → hidden, query, key and value, feed-forward widths that a layer keeps of a token."""
DECODE_STEP_SECONDS = 1.5e-3
DECODE_SEQUENCE_SECONDS = 13e-6
"""What a decoding step takes beside reading memory, and for each sequence of it: on the host, of 16 slow cores a GPU.
"""
READ_SHARE = 0.7
"""Of the memory's rate, while decoding."""
ENGINE_BYTES = 4e9
"""CUDA's context, graphs, and activations of a batch."""
SYNC_SECONDS = {"shared": 0.03, "lora": 0.05, "broadcast": 0.04, "restart": 0.9}
LINK_BYTES_PER_SECOND = {"broadcast": 150e9, "restart": 1.1e9}
"""0.99 GB in 6 ms, and through a file in 0.9 s."""


@dataclass(frozen=True, slots=True)
class Part:
    """One line of the table."""

    name: str
    num_bytes: float
    formula: str


def total(parts: Sequence[Part]) -> float:
    return sum(part.num_bytes for part in parts)


def learner_parts(config: RunConfig, shape: Shape, *, num_gpus: int = 1, counts_weights: bool = True) -> list[Part]:
    """Of one GPU of `num_gpus` that share parameters, gradients and moments (FSDP, tensor parallel)."""
    learner, lora = config.learner, config.model.lora
    trained = shape.adapter(lora.rank) if lora else shape.parameters
    moments = 8.0
    if learner.optimizer.moments == "int8":
        rows = shape.rows(lora.rank if lora else None)
        moments -= sum((8 - bytes_per_element(row)) * elements for row, elements in rows.items()) / trained
    low = 0.0 if lora else 2.0
    gradient = 4.0 if lora or learner.gradients == "float32" else 2.0
    if learner.optimizer.in_backward:
        gradient = 0.0
    parts = [
        Part("weights", 2 * shape.parameters / num_gpus, "2 B · parameters"),
        Part("adapter", (4 * trained if lora else 0) / num_gpus, "4 B · adapter"),
        Part("optimizer", (low + moments) * trained / num_gpus, f"{low + moments:.3g} B · trained (docs/learner.md)"),
        Part("gradients", gradient * trained / num_gpus, f"{gradient:g} B · trained"),
        *activation_parts(config, shape),
    ]
    if not counts_weights:
        parts = [part for part in parts if part.name != "weights"]
    if config.learner.loss.kl_coef > 0 and lora is None:
        parts.append(Part("reference model", 2 * shape.parameters / num_gpus, "2 B · parameters"))
    if num_gpus > 1:
        parts.append(Part("a gathered layer", 4 * shape.parameters / shape.layers, "2 · 2 B · parameters of a layer"))
    share = ALLOCATOR - 1
    return [*parts, Part("torch's overhead", share * total(parts), f"{100 * share:.0f} %, measured")]


def activation_parts(config: RunConfig, shape: Shape) -> list[Part]:
    """At `learner.token_budget` tokens: what layers keep, one layer computed again, and the head's tile."""
    learner, tokens = config.learner, config.learner.token_budget
    active = shape.feed_forward * shape.active_experts
    layer = 2 * (4 * shape.hidden + 2 * shape.query + shape.key_value + 3 * active)
    if config.model.lora:
        layer += 4 * (5 * shape.hidden + shape.query + active)
    what, widths = learner.recomputation.what, _KEPT.get(learner.recomputation.what)
    again = 0 if widths is None else shape.layers // learner.recomputation.every
    formula = "tokens · layers · 2 B (4 hidden + 2 query + keys, values + 3 feed-forward)"
    left = 0
    if widths is not None:
        left = 2 * sum(
            n * width for n, width in zip(widths, (shape.hidden, shape.query, shape.key_value, active), strict=True)
        )
        formula = f"tokens · (layers · 2 B · what {what!r} keeps + one layer whole)"
    kept = (shape.layers - again) * layer + again * left + (layer if again else 0)
    parts = [Part("activations", tokens * kept, formula)]
    rows = min(tokens, learner.logprob_chunk_tokens)
    parts.append(Part("logits", rows * shape.vocabulary * 4.0, "logprob_chunk_tokens · vocabulary · 4 B"))
    if not config.model.lora and learner.gradients == "bfloat16":
        parts.append(Part("head's gradient", 4.0 * shape.hidden * shape.vocabulary, "hidden · vocabulary · 4 B"))
    return parts


@dataclass(frozen=True, slots=True)
class EngineMemory:
    """Of one GPU of an engine."""

    parts: tuple[Part, ...]
    num_sequences: int
    """Of full length, that the whole engine's KV cache holds; 0: the model does not fit."""


def engine_memory(
    config: RunConfig, shape: Shape, *, gpu_bytes: float, num_ranks: int, utilisation: float
) -> EngineMemory:
    room = utilisation * gpu_bytes
    weights = shape.engine_bytes / num_ranks
    cache = room - weights - ENGINE_BYTES
    per_sequence = shape.cache_bytes(config.model.max_length) / num_ranks
    parts = (
        Part("weights", weights, "2 B · parameters / ranks, or as the checkpoint quantises them"),
        Part("engine", ENGINE_BYTES, "context, graphs, a batch's activations; an allowance"),
        Part("KV cache", max(0.0, cache), "gpu_memory_utilization · memory - the above"),
    )
    return EngineMemory(parts, max(0, int(cache / per_sequence)))


def learn_seconds(config: RunConfig, shape: Shape, *, rate: float, num_gpus: int) -> float:
    """6 FLOP a parameter and token (4 for what an adapter leaves frozen), at the share of the rate measured."""
    tokens = config.run.groups_per_step * config.run.rollouts_per_group * config.model.max_length
    again = config.learner.recomputation.what in ("attention", "full")  # `selective` repeats no product
    share = share_of_rate(shape.parameters) * (RECOMPUTED if again else 1.0)
    flops = (4.0 if config.model.lora else 6.0) * shape.computed
    return tokens * flops / (rate * share * num_gpus)


def share_of_rate(parameters: float) -> float:
    """Between the measured sizes by the logarithm; the nearest beyond them."""
    points = [(math.log(size), share) for size, share in SHARE_OF_RATE]
    at = min(max(math.log(parameters), points[0][0]), points[-1][0])
    for (left, low), (right, high) in pairwise(points):
        if at <= right:
            return low + (high - low) * (at - left) / (right - left)
    return points[-1][1]


def sample_seconds(
    config: RunConfig, shape: Shape, engine: EngineMemory, *, bandwidth: float, num_ranks: int, num_engines: int
) -> float:
    """Waves of as many sequences as fit, a decoding step a token: its own time and its sequences', and reading weights
    and KV cache. Engines have GPUs, or a share of `bandwidth`, of their own."""
    wanted = math.ceil(config.run.groups_per_step * config.run.rollouts_per_group / num_engines)
    at_once = min(wanted, engine.num_sequences)
    if at_once == 0:
        return math.inf
    context = config.model.max_length - config.sampling.max_tokens / 2
    active = min(1.0, shape.computed / shape.parameters) if at_once < 8 else 1.0
    read = (active * shape.engine_bytes + at_once * shape.cache_bytes(context)) / num_ranks
    step = DECODE_STEP_SECONDS + at_once * DECODE_SEQUENCE_SECONDS + read / (READ_SHARE * bandwidth)
    return math.ceil(wanted / at_once) * config.sampling.max_tokens * step


def sync_seconds(config: RunConfig, shape: Shape, bridge: str) -> float:
    link = LINK_BYTES_PER_SECOND.get(bridge)
    return SYNC_SECONDS[bridge] + (2.0 * shape.parameters / link if link else 0.0)
