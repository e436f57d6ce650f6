"""A model's sizes, read from its `config.json` alone: how many parameters, and what a token costs to keep."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from syncline.config.model_folder import MXFP4, known_settings, read_settings
from syncline.errors import ConfigError

_NEEDED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
_COUNTS = ("head_dim", "num_key_value_heads", "moe_intermediate_size", "num_experts", "num_local_experts")
_COUNTS += ("n_routed_experts", "num_experts_per_tok", "sliding_window")
_BIASED_ATTENTION = ("qwen2", "qwen2_moe", "qwen2_vl", "qwen2_5_vl", "qwen2_5_vl_text", "qwen2_vl_text")


@dataclass(frozen=True, slots=True)
class Shape:
    """Of a decoder: gated feed-forward layers, grouped-query attention, experts or none. A vision tower is left out."""

    hidden: int
    layers: int
    query: int
    """Heads times their size; `key_value` is of both together, keys and values."""
    key_value: int
    feed_forward: int
    """Of one expert, where there are experts."""
    vocabulary: int
    tied: bool
    attention_bias: bool = False
    experts: int = 1
    active_experts: int = 1
    packed_bytes: float = 2.0
    """Of a parameter that the checkpoint quantises, scales included: of the experts alone (MXFP4), or all layers."""
    packs_experts: bool = False
    sliding_layers: int = 0
    """Whose attention sees the last `window` tokens alone."""
    window: int = 0

    @property
    def attention(self) -> int:
        """Parameters of a layer's attention."""
        biases = self.query + self.key_value if self.attention_bias else 0
        return self.hidden * (2 * self.query + self.key_value) + biases

    @property
    def parameters(self) -> int:
        return self._counted(self.experts) + self.hidden * self.vocabulary * (1 if self.tied else 2)

    @property
    def computed(self) -> int:
        """Parameters that a token is multiplied with: active experts alone, and the head once."""
        return self._counted(self.active_experts) + self.hidden * self.vocabulary

    @property
    def engine_bytes(self) -> float:
        """Of the weights as an engine keeps them; vLLM's Marlin kernels pad experts of MXFP4."""
        if not self.packs_experts:
            packed = self.layers * (self.attention + 3 * self.hidden * self.feed_forward * self.experts)
            return 2.0 * (self.parameters - packed) + self.packed_bytes * packed
        matrices = 3 * self.layers * self.experts
        columns = -(-self.hidden // 256) * 256 * (-(-self.feed_forward // 128) * 128)
        return 2.0 * self.parameters + matrices * (self.packed_bytes * columns - 2.0 * self.hidden * self.feed_forward)

    def cache_bytes(self, tokens: float) -> float:
        """Of the keys and values of a sequence of so many tokens."""
        sliding = self.sliding_layers * min(tokens, self.window)
        return 2.0 * self.key_value * ((self.layers - self.sliding_layers) * tokens + sliding)

    def _counted(self, experts: int) -> int:
        router = self.hidden * self.experts if self.experts > 1 else 0
        layer = self.attention + 3 * self.hidden * self.feed_forward * experts + router + 2 * self.hidden
        return self.layers * layer + self.hidden

    def rows(self, rank: int | None) -> dict[int, int]:
        """A row's length → elements of trained matrices with such rows: the model's, or of `adapter(rank)`."""
        width, wide, experts = self.hidden, self.feed_forward, self.experts
        if rank:
            of = self.layers * rank
            outputs = self.query + self.key_value + width + (2 * wide + width) * experts
            pairs = [(width, (3 + 2 * experts) * width), (self.query, self.query), (wide, wide * experts)]
            pairs = [(row, of * elements) for row, elements in (*pairs, (rank, outputs))]
        else:
            of, ends = self.layers * width, width * self.vocabulary * (1 if self.tied else 2)
            inwards = self.query + self.key_value + 2 * wide * experts + (experts if experts > 1 else 0)
            pairs = [(width, of * inwards + ends), (self.query, of * self.query), (wide, of * wide * experts)]
        return {row: sum(elements for own, elements in pairs if own == row) for row, _ in pairs}

    def adapter(self, rank: int) -> int:
        """Parameters of a LoRA on every linear layer: rank · (inputs + outputs)."""
        attention = 4 * self.hidden + 2 * self.query + self.key_value
        return self.layers * rank * (attention + 3 * (self.hidden + self.feed_forward) * self.experts)


def read_shape(model: str) -> Shape:
    """Of a folder, or of a model of the hub. Raises `ConfigError` when it cannot be read or names no sizes."""
    values = known_settings(model)
    if not values and not Path(model).is_dir():
        values = read_settings(_from_hub(model))
    text = values.get("text_config") or values
    missing = [name for name in _NEEDED if text.get(name) is None]
    lists = [name for name in (*_NEEDED, *_COUNTS) if isinstance(text.get(name), list)]
    if missing or lists:
        fault = f"without {', '.join(missing)}" if missing else f"with a list for {', '.join(lists)}"
        raise ConfigError([f"model.path: {model!r} has a config.json {fault}; give a decoder that has one of each"])
    tied = bool(text.get("tie_word_embeddings", values.get("tie_word_embeddings", False)))
    return shape_of(text, tied=tied, packing=values.get("quantization_config") or {})


def shape_of(text: Mapping[str, Any], *, tied: bool, packing: Mapping[str, Any] = MappingProxyType({})) -> Shape:
    heads = text["num_attention_heads"]
    size = text.get("head_dim") or text["hidden_size"] // heads
    experts = text.get("num_experts") or text.get("num_local_experts") or text.get("n_routed_experts") or 1
    return Shape(
        hidden=text["hidden_size"],
        layers=text["num_hidden_layers"],
        query=heads * size,
        key_value=2 * (text.get("num_key_value_heads") or heads) * size,
        feed_forward=(text.get("moe_intermediate_size") if experts > 1 else None) or text["intermediate_size"],
        vocabulary=text["vocab_size"],
        tied=tied,
        attention_bias=bool(text.get("attention_bias", text.get("model_type") in _BIASED_ATTENTION)),
        experts=experts,
        active_experts=text.get("num_experts_per_tok", 1) if experts > 1 else 1,
        packed_bytes=_packed_bytes(packing),
        packs_experts=packing.get("quant_method") == MXFP4,
        sliding_layers=(text.get("layer_types") or []).count("sliding_attention"),
        window=text.get("sliding_window") or 0,
    )


def _packed_bytes(packing: Mapping[str, Any]) -> float:
    """A value's bits, and its part in its group's scale: 1 byte for 32 values of MXFP4, else 2 for a group."""
    if not packing or packing.get("quant_method") == MXFP4:
        return 1 / 2 + 1 / 32 if packing else 2.0
    groups = list((packing.get("config_groups") or {}).values())
    said = {**packing, **((groups[0].get("weights") or {}) if groups else {})}
    bits, group = said.get("bits") or said.get("num_bits") or 8, said.get("group_size") or 0
    return bits / 8 + (2 / group if group > 0 else 0.0)


def _from_hub(model: str) -> Path:
    try:
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(model, "config.json"))
    except Exception as error:  # the hub's boundary: whatever it raises, the file is not to be had
        why = f"{type(error).__name__}: {error}"
        raise ConfigError([f"model.path: {model!r} is no folder, and the hub gives no config.json: {why}"]) from error
