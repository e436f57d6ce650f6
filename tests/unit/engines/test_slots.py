"""A slot is read as the kernels read it, and what lies beside the adapter is noticed."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from syncline.bridges.adapter import AdapterLayout
from syncline.engines.vllm.adapter_pieces import AdaptedSlice
from syncline.engines.vllm.layout import Part
from syncline.engines.vllm.slots import read, sizes
from syncline.errors import SyncError

pytest.importorskip("vllm")
SLOT, RANK, MAX_RANK = 1, 2, 4
LAYOUT = AdapterLayout({f"k.lora_{part}.weight": shape for part, shape in (("A", (2, 8)), ("B", (6, 2)))}, "float32")


@pytest.fixture
def manager(on_rank: Callable[[int, int], None]) -> Any:
    """A fused layer of 8 inputs and, a slice, 6 outputs, whose second slice is adapted, and an embedding that is not,
    as vLLM keeps them."""
    on_rank(0, 1)
    embedding = SimpleNamespace(lora_a_stacked=torch.zeros(2, 50, 4), lora_b_stacked=torch.zeros(2, 1, 8, 4))
    fused = SimpleNamespace(
        base_layer=SimpleNamespace(input_size=8, tp_rank=0),
        lora_a_stacked=tuple(torch.zeros(2, 1, MAX_RANK, 8) for _ in range(2)),
        lora_b_stacked=tuple(torch.zeros(2, 1, 6, MAX_RANK) for _ in range(2)),
    )
    fused.lora_a_stacked[1][SLOT, 0, :RANK] = 1.0
    fused.lora_b_stacked[1][SLOT, 0, :, :RANK] = 2.0
    return SimpleNamespace(modules={"qk": fused, "embed": embedding}, lora_index_to_id=[None, 77])


def held(manager: Any) -> dict[str, torch.Tensor]:
    rows = (Part(6, 0, 6, counted=True),)
    layers = {name: AdaptedSlice(name, manager.modules["qk"], i, rows) for i, name in enumerate("qk")}
    assert sizes(layers) == {"q": [8, 6], "k": [8, 6]}
    return {name: shard.tensor for name, shard in read(manager, layers, 77, LAYOUT)}


def test_the_adapters_own_slice_and_rank_are_read(manager: Any) -> None:
    pieces = held(manager)
    torch.testing.assert_close(pieces["k.lora_A.weight"], torch.full((2, 8), 1.0))
    torch.testing.assert_close(pieces["k.lora_B.weight"], torch.full((6, 2), 2.0))


def test_another_slot_may_hold_another_adapter(manager: Any) -> None:
    manager.modules["qk"].lora_a_stacked[0][0] = 5.0
    assert held(manager)["k.lora_A.weight"].unique().tolist() == [1.0]


@pytest.mark.parametrize(
    ("write", "named"),
    [
        (lambda m: m["qk"].lora_a_stacked[1][SLOT, 0, RANK:].fill_(1), "k"),
        (lambda m: m["qk"].lora_b_stacked[1][SLOT, 0, 3, RANK:].fill_(1), "k"),
        (lambda m: m["qk"].lora_b_stacked[0][SLOT, 0, 0, 0].fill_(1), "qk"),
        (lambda m: m["embed"].lora_a_stacked[SLOT, 40, 0].fill_(1), "embed"),
    ],
    ids=["padding of A", "padding of B", "a slice that is not adapted", "a layer that is not adapted"],
)
def test_what_lies_beside_the_adapter_is_noticed(manager: Any, write: Any, named: str) -> None:
    write(manager.modules)
    with pytest.raises(SyncError, match=rf"^{named}: the engine's slot holds more"):
        held(manager)
