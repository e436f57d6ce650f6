"""A slot is read as the kernels read it, and what lies beside the adapter is noticed."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from syncline.bridges.adapter import AdapterLayout
from syncline.engines.vllm.adapter_pieces import AdaptedSlice
from syncline.engines.vllm.layout import Part
from syncline.engines.vllm.slots import Slots
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


@pytest.fixture
def slots(manager: Any) -> Slots:
    rows = (Part(6, 0, 6, counted=True),)
    found = Slots(manager, {name: AdaptedSlice(name, manager.modules["qk"], i, rows) for i, name in enumerate("qk")})
    assert found.sizes == {"q": [8, 6], "k": [8, 6]}
    return found


def held(slots: Slots) -> dict[str, torch.Tensor]:
    slots.read(slots.held(77, LAYOUT))
    return {name: shard.tensor for name, shard in slots.held(77, LAYOUT).pieces}


def test_the_adapters_own_slice_and_rank_are_read(slots: Slots) -> None:
    pieces = held(slots)
    torch.testing.assert_close(pieces["k.lora_A.weight"], torch.full((2, 8), 1.0))
    torch.testing.assert_close(pieces["k.lora_B.weight"], torch.full((6, 2), 2.0))


def test_another_slot_may_hold_another_adapter(slots: Slots) -> None:
    slots.manager.modules["qk"].lora_a_stacked[0][0] = 5.0
    assert held(slots)["k.lora_A.weight"].unique().tolist() == [1.0]


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
def test_what_lies_beside_the_adapter_is_noticed(slots: Slots, write: Any, named: str) -> None:
    slots.read(slots.held(77, LAYOUT))
    write(slots.manager.modules)
    with pytest.raises(SyncError, match=rf"^{named}: the engine's slot holds more"):
        slots.read(slots.held(77, LAYOUT))


def test_what_a_slot_holds_is_read_anew_each_time_wherever_its_stacks_have_moved(slots: Slots) -> None:
    """Views of it are kept from one reading to the next."""
    first, layer = slots.read(slots.held(77, LAYOUT)), slots.manager.modules["qk"]
    layer.lora_a_stacked[1][SLOT, 0, 0, 0] = 7.0
    second = slots.read(slots.held(77, LAYOUT))
    layer.lora_a_stacked = tuple(stack.clone() for stack in layer.lora_a_stacked)
    assert slots.read(slots.held(77, LAYOUT)) == second
    layer.lora_a_stacked[1][SLOT, 0, 0, 0] = 1.0
    assert slots.read(slots.held(77, LAYOUT)) == first != second


def test_a_slot_that_another_adapter_takes_is_read_as_that_one(slots: Slots) -> None:
    other = AdapterLayout({"k.lora_A.weight": (1, 8), "k.lora_B.weight": (6, 1)}, "float32")
    first, layer = slots.read(slots.held(77, LAYOUT)), slots.manager.modules["qk"]
    layer.lora_a_stacked[1][SLOT, 0, 1:] = 0.0
    layer.lora_b_stacked[1][SLOT, 0, :, 1:] = 0.0
    slots.manager.lora_index_to_id[SLOT] = 78
    assert slots.read(slots.held(78, other)).layout != first.layout
    assert [list(shard.tensor.shape) for _, shard in slots.held(78, other).pieces] == [[1, 8], [6, 1]]
