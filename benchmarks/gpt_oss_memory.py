"""GPT-OSS on two GPUs, memory part by part: from the configuration's shapes, and measured.

    python benchmarks/gpt_oss_memory.py                                   # the table of docs/gpt_oss.md, no GPU needed
    python benchmarks/gpt_oss_memory.py --measure [--layers 24]           # one micro-batch of the learner on a GPU

Measured is a model of the same shapes with random weights: so many layers of it, forward and backward, everything
recomputed, LoRA of rank `--rank` on attention and experts.
"""

import argparse
from dataclasses import dataclass
from typing import Any

GB = 1e9
PAIR = 2
"""Bytes of a bfloat16."""


@dataclass(frozen=True, slots=True)
class Shape:
    """GPT-OSS 20B's, as its configuration has them."""

    hidden: int = 2880
    inner: int = 2880
    layers: int = 24
    heads: int = 64
    key_heads: int = 8
    width: int = 64
    experts: int = 32
    chosen: int = 4
    vocabulary: int = 201088

    @property
    def attention(self) -> int:
        """Parameters of a layer's attention, norms and router: q, k, v, o with biases, sinks, two norms."""
        queries, keys = self.heads * self.width, self.key_heads * self.width
        linear = self.hidden * (2 * queries + 2 * keys) + queries + 2 * keys + self.hidden
        return linear + self.heads + 2 * self.hidden + self.experts * (self.hidden + 1)

    @property
    def matrices(self) -> int:
        """Of a layer's experts, without biases."""
        return self.experts * 3 * self.hidden * self.inner

    @property
    def biases(self) -> int:
        return self.experts * (2 * self.inner + self.hidden)

    @property
    def ends(self) -> int:
        """Embedding, head and last norm."""
        return 2 * self.vocabulary * self.hidden + self.hidden

    @property
    def parameters(self) -> int:
        return self.layers * (self.attention + self.matrices + self.biases) + self.ends

    def adapter(self, rank: int) -> int:
        queries, keys = self.heads * self.width, self.key_heads * self.width
        attention = 2 * (self.hidden + queries) + 2 * (self.hidden + keys)
        experts = self.experts * (self.hidden + 2 * self.inner + self.inner + self.hidden)
        return self.layers * rank * (attention + experts)


def engine(shape: Shape, *, slots: int, slot_rank: int, tokens: int) -> dict[str, float]:
    """Bytes. MXFP4 is 4 bits a value and 8 a block of 32; Marlin pads 2880 to 3072 (hidden) and 2944 (inner)."""
    hidden, inner = _up(shape.hidden, 256), _up(shape.inner, 128)
    packed = shape.layers * shape.experts * 3 * hidden * inner * (0.5 + 1 / 32)
    plain = PAIR * (shape.parameters - shape.layers * shape.matrices)
    slot = PAIR * Shape(hidden=hidden, inner=inner, layers=shape.layers).adapter(slot_rank)
    cached = 2 * shape.key_heads * shape.width * PAIR * shape.layers / 2
    return {
        "experts, MXFP4": packed,
        "attention, router, embedding, head, biases, bfloat16": plain,
        f"{slots} adapter slots of rank {slot_rank}": slots * slot,
        f"KV of {tokens} tokens, layers without a window": tokens * cached,
        f"KV of {tokens} tokens, were no layer windowed": 2 * tokens * cached,
    }


def learner(shape: Shape, *, rank: int, tokens: int) -> dict[str, float]:
    """Bytes. With every layer recomputed, one layer's working set is alive at once: PEFT adds an expert's A and B to
    its matrices before it computes, so those matrices, and their gradients, exist beside the base's."""
    adapter = shape.adapter(rank)
    rows = tokens * shape.chosen
    return {
        "base, bfloat16": PAIR * shape.parameters,
        "adapter, its gradient and AdamW's moments, float32": 16.0 * adapter,
        "inputs of the layers": PAIR * tokens * shape.hidden * shape.layers,
        "one layer's merged experts and their gradients": 2.0 * PAIR * shape.matrices,
        "one layer's activations": PAIR * rows * (2 * shape.hidden + 4 * shape.inner) * 2.0,
        "log-probabilities, 1024 rows of logits, float32": 2 * 4.0 * 1024 * shape.vocabulary,
    }


def _up(size: int, to: int) -> int:
    return -(-size // to) * to


def measure(shape: Shape, *, rank: int, tokens: int) -> None:
    import torch
    from transformers import AutoModelForCausalLM, GptOssConfig

    from syncline.config.schema import Lora, Recomputation
    from syncline.learner.attention_choice import choose_attention
    from syncline.learner.layers import recompute_layers
    from syncline.learner.model import Scorer, add_lora
    from syncline.learner.packing import pack_samples
    from syncline.types import TrainingSample, VersionSpan

    device = torch.device("cuda")
    config = GptOssConfig(num_hidden_layers=shape.layers, layer_types=None)
    attention = choose_attention("auto", config, device=device, dtype=torch.bfloat16)
    torch.set_default_dtype(torch.bfloat16)
    with device:
        model: Any = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    targets = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
    model = add_lora(model, Lora(rank=rank, alpha=2 * rank, target_parameters=targets))
    recompute_layers(model, Recomputation(what="full"))
    held = torch.cuda.memory_allocated()
    mask, spans = (False,) + (True,) * (tokens - 1), (VersionSpan(0, 1, tokens),)
    sample = TrainingSample((1,) * tokens, mask, (0.0,) + (-1.0,) * (tokens - 1), spans)
    [batch] = pack_samples([sample], token_budget=tokens)
    logprobs, _ = Scorer(1.0, chunk_tokens=1024).score(model, batch.to(device))
    logprobs.mean().backward()
    print(
        f"{shape.layers} layers, {tokens} tokens: weights and adapter {held / GB:.2f} GB, peak "
        f"{torch.cuda.max_memory_allocated() / GB:.2f} GB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="GPT-OSS's memory on two GPUs.")
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=6144, help="of the learner's micro-batch")
    parser.add_argument("--cached", type=int, default=16 * 6144, help="tokens in the engine's KV cache")
    args = parser.parse_args()
    shape = Shape(layers=args.layers)
    parts = {
        "engine": engine(shape, slots=2, slot_rank=8, tokens=args.cached),
        "learner": learner(shape, rank=args.rank, tokens=args.tokens),
    }
    print(f"{shape.parameters:,} parameters, {shape.adapter(args.rank):,} in an adapter of rank {args.rank}")
    for side, rows in parts.items():
        for name, size in rows.items():
            print(f"{side:8} {size / GB:7.2f} GB  {name}")
    if args.measure:
        measure(shape, rank=args.rank, tokens=args.tokens)


if __name__ == "__main__":
    main()
