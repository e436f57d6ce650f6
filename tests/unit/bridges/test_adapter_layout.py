"""An adapter in one buffer: where its tensors lie, that B is scaled, and that the digest is the receipt's."""

import pytest
import torch

from syncline.bridges.adapter import AdapterLayout, LoraLayer, what_cannot_be_held
from syncline.bridges.digest import tensor_digest
from syncline.bridges.receipt import kind_of
from syncline.errors import SyncError

CPU = torch.device("cpu")


def layer(rank: int, num_inputs: int, num_outputs: int, *, scaling: float = 1.5, seed: int = 0) -> LoraLayer:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(rank, num_inputs, generator=generator)
    return LoraLayer(a, torch.randn(num_outputs, rank, generator=generator), scaling)


def packed(layers: dict[str, LoraLayer], dtype: str = "bfloat16") -> tuple[AdapterLayout, torch.Tensor]:
    layout = AdapterLayout.of(layers, dtype)
    buffer = layout.new_buffer(CPU)
    layout.on(buffer).pack(layers)
    return layout, buffer


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_buffer_holds_a_and_the_scaled_b_rounded_once(dtype: str) -> None:
    layers = {"q": layer(4, 24, 40), "v": layer(8, 24, 12, scaling=0.3, seed=1)}
    layout, buffer = packed(layers, dtype)
    views = layout.views(buffer)
    assert list(views) == ["q.lora_A.weight", "q.lora_B.weight", "v.lora_A.weight", "v.lora_B.weight"]
    for name, wanted in layers.items():
        torch.testing.assert_close(views[f"{name}.lora_A.weight"], wanted.a.to(layout.dtype), rtol=0, atol=0)
        scaled = (wanted.b * wanted.scaling).to(layout.dtype)
        torch.testing.assert_close(views[f"{name}.lora_B.weight"], scaled, rtol=0, atol=0)
    assert layout.num_bytes == sum(view.numel() for view in views.values()) * layout.dtype.itemsize


def test_the_digests_are_the_receipts_of_the_words_for_any_number_of_blocks() -> None:
    layers = {"small": layer(4, 8, 8), "exact": layer(8, 256, 256), "large": layer(8, 2000, 3000, seed=2)}
    layout, buffer = packed(layers)
    for name, view in layout.views(buffer).items():
        words = view.reshape(-1).view(torch.int64)
        assert layout.on(buffer).digests()[name] == f"{kind_of(view)}:{tensor_digest(words):016x}"


def test_rows_that_are_no_whole_words_have_a_digest_that_tells_them_apart() -> None:
    layout, buffer = packed({"odd": layer(1, 7, 3)})
    before = layout.on(buffer).digests()
    layout.views(buffer)["odd.lora_B.weight"][2] += 1
    changed = {name for name, digest in layout.on(buffer).digests().items() if digest != before[name]}
    assert changed == {"odd.lora_B.weight"}


def test_swapped_tensors_of_one_shape_have_other_digests() -> None:
    layers = {"k": layer(4, 8, 8), "v": layer(4, 8, 8, seed=3)}
    one, buffer = packed(layers)
    two, swapped = packed({"k": layers["v"], "v": layers["k"]})
    assert one.shapes == two.shapes
    assert all(one.on(buffer).digests()[name] != two.on(swapped).digests()[name] for name in one.shapes)


def test_its_text_builds_the_same_layout() -> None:
    layout, buffer = packed({"q": layer(4, 24, 40), "v": layer(2, 24, 12)})
    same = AdapterLayout.from_text(layout.text)
    assert same.on(buffer).digests() == layout.on(buffer).digests()
    assert same.text == layout.text


@pytest.mark.parametrize("text", ["", "{}", '["bfloat16"]', '["load", {"a": [1]}]', '["bfloat16", {"a": ["1"]}]'])
def test_what_is_no_layout_is_refused(text: str) -> None:
    with pytest.raises(SyncError, match="not the layout of an adapter"):
        AdapterLayout.from_text(text)


def test_an_adapter_that_is_not_finite_is_named() -> None:
    bad = layer(4, 8, 8)
    bad.b[3, 1] = float("nan")
    layout, buffer = packed({"good": layer(4, 8, 8), "bad": bad})
    with pytest.raises(SyncError, match=r"bad\.lora_B\.weight is not finite \(1 of 4 tensors\)"):
        layout.on(buffer).digests()


def test_what_an_engine_cannot_hold_is_named() -> None:
    layout = AdapterLayout.of({"q": layer(4, 8, 8), "gate": layer(4, 8, 8), "wide": layer(4, 8, 9)}, "float32")
    held = {"modules": {"q": [8, 8], "wide": [8, 8]}, "max_rank": 2}
    assert what_cannot_be_held(layout.shapes, held) == [
        "q: rank 4 is above the engine's max_lora_rank = 2",
        "gate: the engine cannot adapt this module",
        "wide: 8 inputs and 9 outputs, in the engine [8, 8]",
    ]
