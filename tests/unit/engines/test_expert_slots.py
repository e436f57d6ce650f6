"""vLLM's own layer of adapted experts, filled by its own slicing on every rank: the pieces add up to the adapter."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rank_digests import combined_together

from syncline.bridges.adapter import AdapterLayout, LoraLayer
from syncline.engines.vllm import compat
from syncline.engines.vllm.adapter_pieces import adaptable
from syncline.engines.vllm.slots import Slots
from syncline.errors import SyncError

pytest.importorskip("vllm")
HIDDEN, INNER, EXPERTS, RANK, MAX_RANK, SLOT = 40, 48, 4, 4, 8, 1
NAME = "model.layers.0.mlp.experts"
LAYERS = {
    f"{NAME}.gate_up_proj": LoraLayer(torch.randn(EXPERTS, RANK, HIDDEN), torch.randn(EXPERTS, 2 * INNER, RANK), 1.0),
    f"{NAME}.down_proj": LoraLayer(torch.randn(EXPERTS, RANK, INNER), torch.randn(EXPERTS, HIDDEN, RANK), 1.0),
}
LAYOUT = AdapterLayout.of(LAYERS, "bfloat16")


def manager(rank: int = 0, ranks: int = 1, *, padded_hidden: int = HIDDEN, padded_inner: int | None = None) -> Any:
    """A rank's layer with the slots that vLLM gives it, without the kernels that only a loaded model has."""
    from vllm.lora.layers import FusedMoE3DWithLoRA

    layer: Any = FusedMoE3DWithLoRA.__new__(FusedMoE3DWithLoRA)
    torch.nn.Module.__init__(layer)
    layer.moe_config = SimpleNamespace(
        num_experts=EXPERTS,
        num_local_experts=EXPERTS,
        hidden_dim=padded_hidden,
        hidden_dim_unpadded=HIDDEN,
        intermediate_size_per_partition=padded_inner or INNER // ranks,
        intermediate_size_per_partition_unpadded=INNER // ranks,
        moe_parallel_config=SimpleNamespace(use_ep=False),
    )
    layer._w13_slices, layer.tp_size, layer.tp_rank, layer.device = 1, ranks, rank, torch.device("cpu")
    layer.enable_moe_shared_loras = False
    config: Any = SimpleNamespace(
        max_loras=2,
        max_lora_rank=MAX_RANK,
        lora_dtype=torch.bfloat16,
        fully_sharded_loras=False,
        enable_moe_shared_loras=False,
    )
    layer.create_lora_weights(2, config, SimpleNamespace(architectures=["GptOssForCausalLM"]))
    return SimpleNamespace(modules={NAME: layer}, packed_modules={}, lora_index_to_id=[None, 77], lora_config=config)


def fill(manager: Any) -> None:
    """As the bridge's `load` and vLLM's activation do it together."""
    buffer = LAYOUT.new_buffer(torch.device("cpu"))
    LAYOUT.on(buffer).pack(LAYERS)
    views = LAYOUT.views(buffer)
    pairs = [(views[f"{name}.lora_A.weight"], views[f"{name}.lora_B.weight"]) for name in LAYERS]
    weights = compat.new_adapter(77, {NAME: pairs}).loras[NAME]
    manager.modules[NAME].set_lora(SLOT, weights.lora_a, weights.lora_b)


def expected() -> dict[str, str]:
    packed = LAYOUT.on(LAYOUT.new_buffer(torch.device("cpu")))
    packed.pack(LAYERS)
    return packed.digests()


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_ranks_pieces_add_up_to_the_adapter(ranks: int) -> None:
    """Gate and up rows take turns: a rank's rows of both are neighbours, and vLLM takes them so."""
    found = []
    for rank in range(ranks):
        mine = manager(rank, ranks)
        fill(mine)
        assert Slots(mine, adaptable(mine)).sizes == {
            f"{NAME}.gate_up_proj": [EXPERTS, HIDDEN, 2 * INNER],
            f"{NAME}.down_proj": [EXPERTS, INNER, HIDDEN],
        }
        found.append(Slots(mine, adaptable(mine)).held(77, LAYOUT).pieces)
    assert combined_together(found) == expected()


def test_what_the_kernels_pad_is_beside_the_adapter() -> None:
    mine = manager(padded_hidden=64, padded_inner=64)
    fill(mine)
    slots = Slots(mine, adaptable(mine))
    slots.read(slots.held(77, LAYOUT))
    assert combined_together([slots.held(77, LAYOUT).pieces]) == expected()
    mine.modules[NAME].w2_lora_a_stacked[0][SLOT, 2, 0, INNER] = 1
    with pytest.raises(SyncError, match=r"down_proj: the engine's slot holds more"):
        slots.read(slots.held(77, LAYOUT))


def test_padded_experts_on_several_ranks_are_refused_because_vllm_cuts_their_adapters_elsewhere() -> None:
    mine = manager(1, 2, padded_inner=32)
    with pytest.raises(SyncError, match=r"pads a rank's 24 columns of the experts to 32.*tensor_parallel_size to 1"):
        Slots(mine, adaptable(mine)).held(77, LAYOUT)


@pytest.mark.parametrize(
    "stack", ["w13_lora_a_stacked", "w13_lora_b_stacked", "w2_lora_a_stacked", "w2_lora_b_stacked"]
)
def test_one_experts_spoilt_value_changes_that_tensor_alone(stack: str) -> None:
    mine = manager()
    fill(mine)
    getattr(mine.modules[NAME], stack)[0][SLOT, 3, 1, 1] += 1
    found = combined_together([Slots(mine, adaptable(mine)).held(77, LAYOUT).pieces])
    matrix = "gate_up_proj" if "w13" in stack else "down_proj"
    side = "A" if "_a_" in stack else "B"
    assert [name for name in found if found[name] != expected()[name]] == [f"{NAME}.{matrix}.lora_{side}.weight"]
