"""vLLM's own LoRA layers, filled by their own slicing on every rank: the pieces must add up to the adapter."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rank_digests import combined_together

from syncline.bridges.adapter import AdapterLayout, LoraLayer
from syncline.engines.vllm.adapter_pieces import adaptable
from syncline.engines.vllm.expert_slots import stacks
from syncline.engines.vllm.slots import Slots, whole
from syncline.errors import SyncError

pytest.importorskip("vllm")
OnRank = Callable[[int, int], None]
HIDDEN, HEADS, KV_HEADS, HEAD_SIZE, INTERMEDIATE, EXPERTS = 32, 8, 2, 8, 64, 4
RANK, MAX_RANK, SLOT = 4, 16, 1
APART = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
TOGETHER = {name: [name] for name in APART}
"""As Phi-3's checkpoint has them."""
SIZES = {
    "q_proj": (HIDDEN, HEADS * HEAD_SIZE),
    "k_proj": (HIDDEN, KV_HEADS * HEAD_SIZE),
    "v_proj": (HIDDEN, KV_HEADS * HEAD_SIZE),
    "o_proj": (HEADS * HEAD_SIZE, HIDDEN),
    "gate_proj": (HIDDEN, INTERMEDIATE),
    "up_proj": (HIDDEN, INTERMEDIATE),
    "down_proj": (INTERMEDIATE, HIDDEN),
    "fc": (HIDDEN, INTERMEDIATE),
    "router": (HIDDEN, EXPERTS),
}


def adapter(packed: dict[str, list[str]], rank: int = RANK, *, seed: int = 0) -> dict[str, LoraLayer]:
    """A pair for every layer, in the checkpoint's names."""
    torch.manual_seed(seed)
    found = dict(SIZES)
    for layer, names in packed.items():
        if names == [layer]:
            found[layer] = (HIDDEN, sum(found.pop(part)[1] for part in APART[layer]))
    return {name: LoraLayer(torch.randn(rank, i), torch.randn(o, rank), 1.0) for name, (i, o) in found.items()}


def manager(packed: dict[str, list[str]], *, fully_sharded: bool = False) -> Any:
    """vLLM's layers of this rank, one of each kind, with the slots that its adapter manager gives them."""
    from vllm.config.lora import LoRAConfig
    from vllm.lora.utils import from_layer
    from vllm.model_executor.layers import linear

    layers = {
        "qkv_proj": linear.QKVParallelLinear(HIDDEN, HEAD_SIZE, HEADS, KV_HEADS, bias=True),
        "o_proj": linear.RowParallelLinear(HEADS * HEAD_SIZE, HIDDEN),
        "gate_up_proj": linear.MergedColumnParallelLinear(HIDDEN, [INTERMEDIATE] * 2),
        "down_proj": linear.RowParallelLinear(INTERMEDIATE, HIDDEN),
        "fc": linear.ColumnParallelLinear(HIDDEN, INTERMEDIATE),
        "router": linear.ReplicatedLinear(HIDDEN, EXPERTS),
    }
    config = LoRAConfig(
        max_lora_rank=MAX_RANK, max_loras=2, lora_dtype=torch.bfloat16, fully_sharded_loras=fully_sharded
    )
    modules = {name: from_layer(layer, 2, config, packed.get(name, [])) for name, layer in layers.items()}
    return SimpleNamespace(modules=modules, packed_modules=packed, lora_index_to_id=[None, 77], lora_config=config)


def fill(manager: Any, layers: dict[str, LoraLayer]) -> None:
    """As vLLM activates an adapter: every rank is given the whole, and takes its part."""
    for name, module in manager.modules.items():
        names = manager.packed_modules.get(name, [name])
        pairs = [(layers[n].a.bfloat16(), layers[n].b.bfloat16()) for n in names]
        a, b = (list(side) for side in zip(*pairs, strict=True))
        module.set_lora(SLOT, *((a[0], b[0]) if len(names) == 1 else (a, b)))


def expected(layers: dict[str, LoraLayer]) -> tuple[AdapterLayout, dict[str, str]]:
    """The learner's digests."""
    layout = AdapterLayout.of(layers, "bfloat16")
    buffer = layout.new_buffer(torch.device("cpu"))
    packed = layout.on(buffer)
    packed.pack(layers)
    return layout, packed.digests()


def held(
    on_rank: OnRank,
    num_ranks: int,
    layers: dict[str, LoraLayer],
    *,
    packed: dict[str, list[str]] = APART,
    fully_sharded: bool = False,
    spoil: Callable[[int, Any], None] = lambda rank, modules: None,
) -> dict[str, str]:
    """What all ranks together say of their slots."""
    layout, ranks = expected(layers)[0], []
    for rank in range(num_ranks):
        on_rank(rank, num_ranks)
        mine = manager(packed, fully_sharded=fully_sharded)
        fill(mine, layers)
        spoil(rank, mine.modules)
        slots = Slots(mine, adaptable(mine))
        assert slots.sizes == {n: [len(layer.a.T), len(layer.b)] for n, layer in layers.items()}
        slots.read(slots.held(77, layout))
        ranks.append(slots.held(77, layout).pieces)
    return combined_together(ranks)


def test_stages_of_a_pipeline_hold_their_own_layers_of_the_adapter(on_rank: OnRank) -> None:
    """Two stages of two ranks: the first has the attention, the second the rest."""
    layers, ranks = adapter(APART), []
    layout, whole = expected(layers)
    for stage in range(2):
        for rank in range(2):
            on_rank(rank, 2)
            mine = manager(APART)
            fill(mine, layers)
            mine.modules = {
                n: module for n, module in mine.modules.items() if (n in ("qkv_proj", "o_proj")) == (stage == 0)
            }
            ranks.append(Slots(mine, adaptable(mine)).held(77, layout).pieces)
    assert combined_together(ranks, num_stages=2) == whole
    with pytest.raises(SyncError, match="lacks it, rank 0 holds it"):
        combined_together(ranks, num_stages=1)


def every_cut(test: Callable[..., None]) -> Callable[..., None]:
    """With `num_ranks`, `packed` and `fully_sharded`."""
    test = pytest.mark.parametrize("num_ranks", [1, 2, 4, 8])(test)
    test = pytest.mark.parametrize("packed", [APART, TOGETHER], ids=["apart", "fused in the checkpoint"])(test)
    return pytest.mark.parametrize("fully_sharded", [False, True], ids=["sharded", "fully sharded"])(test)


@every_cut
def test_the_ranks_pieces_add_up_to_the_adapter(
    on_rank: OnRank, num_ranks: int, packed: dict[str, list[str]], fully_sharded: bool
) -> None:
    """8 ranks share two key heads; fully sharded, the last of them hold no row of an adapter below the slot's rank."""
    layers = adapter(packed)
    assert held(on_rank, num_ranks, layers, packed=packed, fully_sharded=fully_sharded) == expected(layers)[1]


@every_cut
def test_a_slot_is_filled_as_vllm_fills_it(
    on_rank: OnRank, num_ranks: int, packed: dict[str, list[str]], fully_sharded: bool
) -> None:
    """Bit for bit, over an adapter of a larger rank that was there before."""
    layers = adapter(packed)
    layout = expected(layers)[0]
    buffer = layout.new_buffer(torch.device("cpu"))
    layout.on(buffer).pack(layers)
    for rank in range(num_ranks):
        on_rank(rank, num_ranks)
        theirs, ours = (manager(packed, fully_sharded=fully_sharded) for _ in range(2))
        fill(theirs, layers)
        fill(ours, adapter(packed, MAX_RANK))
        ours.lora_index_to_id[SLOT] = None
        activated(ours)
        Slots(ours, adaptable(ours)).load(77, layout, layout.views(buffer))
        for name, module in theirs.modules.items():
            pairs = zip(stacks(module), stacks(ours.modules[name]), strict=True)
            for (a, b), (own_a, own_b) in pairs:
                torch.testing.assert_close(own_a[SLOT], a[SLOT], rtol=0, atol=0)
                torch.testing.assert_close(own_b[SLOT], b[SLOT], rtol=0, atol=0)


def test_a_stage_that_has_no_layer_of_the_adapter_holds_none_of_it(on_rank: OnRank) -> None:
    on_rank(0, 1)
    layers = {"fc": adapter(APART)["fc"]}
    layout = expected(layers)[0]
    mine = manager(APART)
    fill(mine, adapter(APART, MAX_RANK))
    mine.modules = {name: module for name, module in mine.modules.items() if name != "fc"}
    activated(mine)
    slots = Slots(mine, adaptable(mine))
    buffer = layout.new_buffer(torch.device("cpu"))
    layout.on(buffer).pack(layers)
    held = slots.load(77, layout, layout.views(buffer))
    assert (held.pieces, slots.read(held).digests) == ([], [])
    assert not any(stack[SLOT].any() for module in mine.modules.values() for pair in stacks(module) for stack in pair)


def activated(manager: Any) -> list[int]:
    """What vLLM's manager does of an adapter whose layers are none of these: every one is zeroed. Returns a list of
    those that it will have activated."""
    ids: list[int] = []

    def activate(adapter_id: int) -> None:
        ids.append(adapter_id)
        manager.lora_index_to_id[SLOT] = adapter_id
        for module in manager.modules.values():
            module.reset_lora(SLOT)

    def remove(adapter_id: int) -> None:
        manager.lora_index_to_id = [None if held == adapter_id else held for held in manager.lora_index_to_id]

    manager.device, manager.activate_adapter, manager.remove_adapter = torch.device("cpu"), activate, remove
    manager.add_adapter = manager.pin_adapter = lambda adapter: None
    return ids


def test_the_next_version_is_written_over_the_last_one_of_the_slot(on_rank: OnRank) -> None:
    """vLLM activates an adapter again where the slot has lost it, or would hold more than the new one."""
    on_rank(0, 1)
    mine = manager(APART)
    mine.lora_index_to_id[SLOT] = None
    ids, slots = activated(mine), Slots(mine, adaptable(mine))

    def loaded(layers: dict[str, LoraLayer], layout: AdapterLayout) -> int:
        buffer = layout.new_buffer(torch.device("cpu"))
        packed = layout.on(buffer)
        packed.pack(layers)
        held = slots.load(77, layout, layout.views(buffer))
        assert slots.read(held).layout == held.told
        assert combined_together([held.pieces]) == packed.digests()
        return len(ids)

    first, second, smaller = adapter(APART), adapter(APART, seed=1), adapter(APART, RANK - 1)
    layout, other = expected(first)[0], expected(smaller)[0]
    assert [loaded(first, layout), loaded(second, layout), loaded(first, layout)] == [1, 1, 1]
    assert [loaded(smaller, other), loaded(second, layout)] == [2, 3]
    mine.remove_adapter(77)
    assert loaded(first, layout) == 4


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_slot_whose_adapter_is_not_known_is_told_to_its_largest_rank(on_rank: OnRank, num_ranks: int) -> None:
    layers = adapter(APART, MAX_RANK)
    on_rank(0, num_ranks)
    mine = manager(APART)
    layout = whole(Slots(mine, adaptable(mine)))
    assert set(layout.shapes.items()) == set(expected(layers)[0].shapes.items())
    assert layout.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("layer", "stack", "name"),
    [
        ("qkv_proj", lambda layer: layer.lora_b_stacked[1][SLOT, 0, 2, :RANK], "k_proj.lora_B.weight"),
        ("gate_up_proj", lambda layer: layer.lora_b_stacked[0][SLOT, 0, 3, :RANK], "gate_proj.lora_B.weight"),
        ("down_proj", lambda layer: layer.lora_a_stacked[0][SLOT, 0, 1, 5], "down_proj.lora_A.weight"),
    ],
)
def test_one_ranks_spoilt_piece_changes_that_tensor_alone(
    on_rank: OnRank, layer: str, stack: Callable[[Any], torch.Tensor], name: str
) -> None:
    def spoil(rank: int, modules: Any) -> None:
        if rank == 1:
            stack(modules[layer]).add_(1)

    layers = adapter(APART)
    found, wanted = held(on_rank, 2, layers, spoil=spoil), expected(layers)[1]
    assert [n for n in wanted if wanted[n] != found[n]] == [name]


@pytest.mark.parametrize(
    ("layer", "stack", "message"),
    [
        ("fc", "lora_a_stacked", r"fc\.lora_A\.weight: ranks 0 and 1 hold different copies"),
        ("o_proj", "lora_b_stacked", r"o_proj\.lora_B\.weight: ranks 0 and 1 hold different copies"),
    ],
)
def test_ranks_that_hold_different_copies_are_named(on_rank: OnRank, layer: str, stack: str, message: str) -> None:
    def spoil(rank: int, modules: Any) -> None:
        if rank == 1:
            getattr(modules[layer], stack)[0][SLOT, 0, 0, 0] += 1

    with pytest.raises(SyncError, match=message):
        held(on_rank, 2, adapter(APART), spoil=spoil)


@pytest.mark.parametrize("fully_sharded", [False, True], ids=["sharded", "fully sharded"])
def test_what_lies_beside_the_adapter_on_any_rank_is_noticed(on_rank: OnRank, fully_sharded: bool) -> None:
    """Fully sharded over 4 ranks, a slot of rank 16 gives the last one rows that this adapter does not have."""

    def spoil(rank: int, modules: Any) -> None:
        if rank == 3:
            modules["qkv_proj"].lora_a_stacked[2][SLOT, 0, -1, 0] = 1

    with pytest.raises(SyncError, match=r"^v_proj: the engine's slot holds more"):
        held(on_rank, 4, adapter(APART), spoil=spoil, fully_sharded=fully_sharded)


def test_ranks_that_swapped_their_parts_are_noticed(on_rank: OnRank) -> None:
    """Each piece is right, and in the wrong place."""
    layers = adapter(APART)
    parts = layers["down_proj"].a.bfloat16().chunk(2, dim=1)

    def spoil(rank: int, modules: Any) -> None:
        modules["down_proj"].lora_a_stacked[0][SLOT, 0, :RANK] = parts[1 - rank]

    found, wanted = held(on_rank, 2, layers, spoil=spoil), expected(layers)[1]
    assert [n for n in wanted if wanted[n] != found[n]] == ["down_proj.lora_A.weight"]
