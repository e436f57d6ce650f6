"""vLLM's own layers, loaded by their own loaders on every rank: the pieces must be slices of what was loaded."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from rank_digests import combined
from torch import nn

from syncline.bridges.manifest import Shard
from syncline.bridges.receipt import parameter_digests
from syncline.engines.vllm.layout import checkpoint_views, refuse_copies
from syncline.errors import SyncError

pytest.importorskip("vllm")
HIDDEN, HEADS, KV_HEADS, HEAD_SIZE, INTERMEDIATE, VOCABULARY = 32, 8, 2, 8, 48, 70
PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
SHAPES = {
    "embed_tokens.weight": (VOCABULARY, HIDDEN),
    "norm.weight": (HIDDEN,),
    "q_proj.weight": (HEADS * HEAD_SIZE, HIDDEN),
    "q_proj.bias": (HEADS * HEAD_SIZE,),
    "k_proj.weight": (KV_HEADS * HEAD_SIZE, HIDDEN),
    "k_proj.bias": (KV_HEADS * HEAD_SIZE,),
    "v_proj.weight": (KV_HEADS * HEAD_SIZE, HIDDEN),
    "v_proj.bias": (KV_HEADS * HEAD_SIZE,),
    "o_proj.weight": (HIDDEN, HEADS * HEAD_SIZE),
    "o_proj.bias": (HIDDEN,),
    "gate_proj.weight": (INTERMEDIATE, HIDDEN),
    "up_proj.weight": (INTERMEDIATE, HIDDEN),
    "down_proj.weight": (HIDDEN, INTERMEDIATE),
    "lm_head.weight": (VOCABULARY, HIDDEN),
    "lm_head.bias": (VOCABULARY,),
}


def checkpoint(shapes: dict[str, tuple[int, ...]] = SHAPES) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {name: torch.randn(shape) for name, shape in shapes.items()}


class Block(nn.Module):
    """One of each kind of layer, with a name for vLLM's and the checkpoint's tables."""

    packed_modules_mapping = PACKED

    def __init__(self) -> None:
        from vllm.model_executor.layers import linear
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

        super().__init__()
        self.embed_tokens = VocabParallelEmbedding(VOCABULARY, HIDDEN)
        self.norm = nn.LayerNorm(HIDDEN, bias=False)
        self.qkv_proj = linear.QKVParallelLinear(HIDDEN, HEAD_SIZE, HEADS, KV_HEADS, bias=True)
        self.o_proj = linear.RowParallelLinear(HEADS * HEAD_SIZE, HIDDEN, bias=True)
        self.gate_up_proj = linear.MergedColumnParallelLinear(HIDDEN, [INTERMEDIATE] * 2, bias=False)
        self.down_proj = linear.RowParallelLinear(INTERMEDIATE, HIDDEN, bias=False)
        self.lm_head = ParallelLMHead(VOCABULARY, HIDDEN, bias=True)

    def load(self, weights: dict[str, torch.Tensor]) -> "Block":
        shards = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "gate_proj": 0, "up_proj": 1}
        fused = {part: layer for layer, parts in self.packed_modules_mapping.items() for part in parts}
        for name, tensor in weights.items():
            layer, leaf = name.split(".")
            parameter = getattr(getattr(self, fused.get(layer, layer)), leaf)
            if layer in shards:
                parameter.weight_loader(parameter, tensor, shards[layer])
            elif hasattr(parameter, "weight_loader"):
                parameter.weight_loader(parameter, tensor)
            else:
                parameter.data.copy_(tensor)
        return self


def assert_slices(pieces: list[tuple[str, Shard]], weights: dict[str, torch.Tensor]) -> None:
    for name, shard in pieces:
        region = tuple(slice(s, s + n) for s, n in zip(shard.start, shard.tensor.shape, strict=True))
        assert shard.shape == tuple(weights[name].shape), name
        assert torch.equal(shard.tensor, weights[name][region]), name


@pytest.mark.parametrize("num_ranks", [1, 2, 4, 8])
def test_the_ranks_pieces_are_the_checkpoint(on_rank: Callable[[int, int], None], num_ranks: int) -> None:
    """8 ranks hold one query head each and a copy of one of two key heads; the last ones hold no vocabulary."""
    weights, ranks = checkpoint(), []
    for rank in range(num_ranks):
        on_rank(rank, num_ranks)
        pieces = list(checkpoint_views(Block().load(weights)))
        assert [name for name, _ in pieces] == list(dict.fromkeys(name for name, _ in pieces))
        assert_slices(pieces, weights)
        ranks.append(pieces)
    assert combined(ranks) == parameter_digests(weights.items())


def test_a_fault_on_one_rank_changes_that_parameter_alone(on_rank: Callable[[int, int], None]) -> None:
    weights, ranks = checkpoint(), []
    for rank in range(2):
        on_rank(rank, 2)
        block = Block().load(weights)
        if rank == 1:
            block.o_proj.weight.data[3, 1] += 1
        ranks.append(list(checkpoint_views(block)))
    expected, found = parameter_digests(weights.items()), combined(ranks)
    assert [name for name in expected if expected[name] != found[name]] == ["o_proj.weight"]


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_what_the_checkpoint_fuses_keeps_its_name(on_rank: Callable[[int, int], None], num_ranks: int) -> None:
    """Phi-3: one `qkv_proj` in the checkpoint, of which a rank holds a piece of q, one of k and one of v."""
    apart, ranks = checkpoint(), []
    whole = dict(apart)
    for layer, parts in PACKED.items():
        for leaf in ("weight", "bias"):
            if f"{parts[0]}.{leaf}" in apart:
                whole[f"{layer}.{leaf}"] = torch.cat([whole.pop(f"{part}.{leaf}") for part in parts])
    for rank in range(num_ranks):
        on_rank(rank, num_ranks)
        block = Block().load(apart)
        block.packed_modules_mapping = {layer: [layer] for layer in PACKED}
        pieces = list(checkpoint_views(block))
        assert_slices(pieces, whole)
        assert sum(name == "qkv_proj.weight" for name, _ in pieces) == (1 if num_ranks == 1 else 3)
        ranks.append(pieces)
    assert combined(ranks) == parameter_digests(whole.items())


def test_tied_parameters_come_once_under_their_first_name(on_rank: Callable[[int, int], None]) -> None:
    on_rank(0, 1)
    block = Block()
    block.lm_head.tie_weights(block.embed_tokens)
    names = [name for name, _ in checkpoint_views(block)]
    assert "embed_tokens.weight" in names and "lm_head.weight" not in names


def test_the_scales_of_the_kv_cache_are_no_checkpoints(on_rank: Callable[[int, int], None]) -> None:
    on_rank(0, 1)
    block = Block()
    expected = dict(checkpoint_views(block)).keys()
    block.attn = nn.Module()
    block.attn.register_parameter("_k_scale", nn.Parameter(torch.ones(())))
    assert dict(checkpoint_views(block)).keys() == expected


def test_pieces_are_views_of_the_memory_that_is_read(on_rank: Callable[[int, int], None]) -> None:
    on_rank(0, 2)
    block = Block().load(checkpoint())
    pieces = dict(checkpoint_views(block))
    pieces["k_proj.weight"].tensor.zero_()
    own = block.qkv_proj.weight.data.split(block.qkv_proj.output_partition_sizes)
    assert own[1].abs().sum() == 0 and own[0].abs().sum() > 0


def test_a_fusion_that_the_tables_do_not_explain_is_refused_by_name(on_rank: Callable[[int, int], None]) -> None:
    on_rank(0, 1)
    block = Block()
    block.packed_modules_mapping = {"qkv_proj": ["q_proj", "kv_proj"]}
    with pytest.raises(SyncError, match=r"qkv_proj\.weight: vLLM fuses \['q_proj', 'kv_proj'\]"):
        list(checkpoint_views(block))


def test_a_split_without_a_table_is_refused_by_name(on_rank: Callable[[int, int], None]) -> None:
    """A parameter that a module of the model's own loads: whole on one rank, anybody's guess on two."""
    block_of: dict[int, Any] = {}
    for num_ranks in (1, 2):
        on_rank(0, num_ranks)
        block_of[num_ranks] = block = Block()
        block.norm.weight.weight_loader = lambda *_: None
        if num_ranks == 1:
            assert "norm.weight" in dict(checkpoint_views(block))
        else:
            with pytest.raises(SyncError, match=r"norm\.weight: LayerNorm may split it"):
                list(checkpoint_views(block))


def test_renamed_parameters_come_under_the_checkpoints_name(on_rank: Callable[[int, int], None]) -> None:
    from vllm.model_executor.models.utils import WeightsMapper

    on_rank(0, 1)
    model: Any = nn.Module()
    model.h = Block()
    model.packed_modules_mapping = PACKED
    model.hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_prefix={"transformer.": "h."},
        orig_to_new_stacked={
            ".q_proj": (".qkv_proj", "q"),
            ".k_proj": (".qkv_proj", "k"),
            ".v_proj": (".qkv_proj", "v"),
            ".gate_proj": (".gate_up_proj", 0),
            ".up_proj": (".gate_up_proj", 1),
        },
        orig_to_new_suffix={".ln_f.weight": ".norm.weight"},
    )
    names = [name for name, _ in checkpoint_views(model)]
    assert names[:3] == ["h.embed_tokens.weight", "h.norm.weight", "h.q_proj.weight"], "names that need no renaming"
    model.hf_to_vllm_mapper.orig_to_new_substr = {"embed_tokens": None}
    with pytest.raises(SyncError, match=r"h\.embed_tokens\.weight: vLLM loads .* under a name"):
        list(checkpoint_views(model))
    model.hf_to_vllm_mapper.orig_to_new_substr = {"embed_tokens": "gone", "wte": "embed_tokens"}
    names = [name for name, _ in checkpoint_views(model)]
    assert names[:2] == ["h.wte.weight", "h.norm.weight"]


def test_parts_of_a_vision_language_model_come_under_the_learners_names(on_rank: Callable[[int, int], None]) -> None:
    """Its mapper also knows older checkpoints' names, which are vLLM's own; a part's own mapper does the fusing."""
    from types import SimpleNamespace

    from vllm.model_executor.models.utils import WeightsMapper

    on_rank(0, 1)
    model: Any = nn.Module()
    model.language_model, model.visual = nn.Module(), Block()
    model.language_model.model = Block()
    model.packed_modules_mapping = PACKED
    model.config = SimpleNamespace(model_type="unheard-of", vision_config=object())
    model.hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_prefix={"model.language_model.": "language_model.model.", "model.visual.": "visual."}
    )
    names = [name for name, _ in checkpoint_views(model)]
    assert "model.language_model.q_proj.weight" in names
    assert "model.visual.gate_proj.weight" in names
    assert all(name.startswith(("model.language_model.", "model.visual.")) for name in names)


def test_what_latent_attention_keeps_twice_is_no_checkpoint_parameter(
    on_rank: Callable[[int, int], None],
) -> None:
    """Views of `kv_b_proj` follow a write in place; a copy does not, and is named."""
    from vllm.model_executor.layers.attention import MLAAttention

    on_rank(0, 1)
    block: Any = Block()
    block.attn = nn.Module.__new__(MLAAttention)
    nn.Module.__init__(block.attn)
    block.attn.W_UV = nn.Parameter(block.down_proj.weight.data.t())
    names = [name for name, _ in checkpoint_views(block)]
    assert not [name for name in names if "W_UV" in name]
    refuse_copies(block)
    block.attn.W_UV = nn.Parameter(block.down_proj.weight.data.clone())
    with pytest.raises(SyncError, match=r"attn\.W_UV is vLLM's own copy of other weights"):
        refuse_copies(block)
