"""The digest, against a plain-Python splitmix64, and the faults it must catch."""

import math
import weakref
from collections.abc import Iterator

import pytest
import torch

from syncline.bridges import digest, digest_host
from syncline.bridges.digest import piece_sums, tensor_digest
from syncline.bridges.manifest import Shard
from syncline.bridges.receipt import differences, model_digest, parameter_digests
from syncline.errors import SyncError

MASK = (1 << 64) - 1


def reference_digest(words: list[int]) -> int:
    """splitmix64's finaliser over unsigned integers, word by word."""
    total = 0
    for position, word in enumerate(words):
        x = (word ^ (position * 0x9E3779B97F4A7C15)) & MASK
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
        total += x ^ (x >> 31)
    return total & MASK


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_digest_is_the_sum_of_mixed_words(dtype: torch.dtype) -> None:
    tensor = torch.randn(6, 128, generator=torch.Generator().manual_seed(0)).to(dtype)
    words = [int(word) & MASK for word in tensor.view(torch.int64).flatten()]
    assert tensor_digest(tensor) == reference_digest(words)


def test_a_cpu_digests_in_chunks_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """They end inside runs, and hold several."""
    tensor = torch.randn(6, 1024, generator=torch.Generator().manual_seed(1))
    words = [int(word) & MASK for word in tensor.view(torch.int64).flatten()]
    halves = [Shard(half, tuple(tensor.shape), start) for half, start in halves_of(tensor)]
    for chunk in (32, 200, 512, 700, 1 << 15):
        monkeypatch.setattr(digest_host, "_CHUNK_WORDS", chunk)
        assert tensor_digest(tensor) == reference_digest(words)
        for pair in (halves[:2], halves[2:]):
            assert sum(piece_sums(("w", half) for half in pair).digests) & MASK == reference_digest(words)


def halves_of(tensor: torch.Tensor) -> list[tuple[torch.Tensor, tuple[int, int]]]:
    rows, columns = tensor.shape[0] // 2, tensor.shape[1] // 2
    above, left = (tensor[:rows], (0, 0)), (tensor[:, :columns], (0, 0))
    return [above, (tensor[rows:], (rows, 0)), left, (tensor[:, columns:], (0, columns))]


def test_a_row_that_is_no_multiple_of_eight_bytes_goes_element_by_element() -> None:
    tensor = torch.tensor([[1.0, -2.0, 3.0]], dtype=torch.bfloat16)
    words = [int(word) & MASK for word in tensor.view(torch.int16).flatten()]
    assert tensor_digest(tensor) == reference_digest(words)


def test_digests_of_row_shards_add_up_to_the_whole() -> None:
    tensor = torch.randn(40, 24, dtype=torch.float32).bfloat16()
    parts = tensor_digest(tensor[:13]) + tensor_digest(tensor[13:], offset=13 * 24)
    assert parts & MASK == tensor_digest(tensor)


@pytest.mark.parametrize("fault", ["swapped rows", "one bit", "truncated", "negative zero"])
def test_a_changed_tensor_has_another_digest(fault: str) -> None:
    tensor = torch.randn(8, 8)
    tensor[0, 0] = 0.0
    changed = tensor.clone()
    if fault == "swapped rows":
        changed[[1, 2]] = tensor[[2, 1]]
    elif fault == "one bit":
        changed.view(torch.int32)[3, 3] ^= 1
    elif fault == "truncated":
        changed[-1] = 0
    else:
        changed[0, 0] = -0.0
    assert tensor_digest(changed) != tensor_digest(tensor)


def test_a_transposed_view_digests_as_its_values_lie() -> None:
    tensor = torch.randn(8, 16)
    assert tensor_digest(tensor.t()) == tensor_digest(tensor.t().contiguous())
    assert tensor_digest(tensor.t()) != tensor_digest(tensor)


def test_the_model_digest_depends_on_names_and_types_not_on_order() -> None:
    a, b = torch.randn(4, 4), torch.randn(4, 4)
    expected = model_digest(parameter_digests([("a", a), ("b", b)]))
    assert expected == model_digest(parameter_digests([("b", b), ("a", a)]))
    assert expected != model_digest(parameter_digests([("a", b), ("b", a)]))
    assert expected != model_digest(parameter_digests([("a", a.bfloat16()), ("b", b)]))


def test_differences_name_the_parameter() -> None:
    learner = {"same": "1", "changed": "2", "only_here": "3"}
    engine = {"same": "1", "changed": "9", "only_there": "4"}
    assert differences(learner, engine) == [
        "only_here: missing in the engine",
        "only_there: not in the learner",
        "changed: the learner 2, the engine 9",
    ]
    assert differences(learner, engine, limit=1)[-1] == "… and 2 more"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("row", [4, 256], ids=["a word an element", "words of several"])
def test_weights_that_are_not_finite_are_refused_by_name(dtype: torch.dtype, value: float, row: int) -> None:
    named = {
        "good": torch.ones(3, 5, dtype=dtype),
        "empty": torch.ones(0),
        "largest": torch.full((2, 2), torch.finfo(dtype).max, dtype=dtype),
        "bad": torch.full((4, row), -1e30, dtype=dtype),
        "bytes": torch.full((8,), 255, dtype=torch.uint8),
    }
    parameter_digests(named.items(), finite=True)
    named["bad"][2, row - 1] = value
    parameter_digests(named.items())
    with pytest.raises(SyncError, match=r"bad is not finite \(1 of 5 parameters\)"):
        parameter_digests(named.items(), finite=True)


def test_tensors_made_to_be_looked_at_once_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """A merged adapter's weights are a second model if all of them are held at once."""
    monkeypatch.setattr(digest, "BATCH_BYTES", 64)
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0

    def made() -> Iterator[tuple[str, torch.Tensor]]:
        nonlocal most
        for i in range(20):
            tensor = torch.full((8,), float(i))
            alive.append(weakref.ref(tensor))
            most = max(most, sum(one() is not None for one in alive))
            yield str(i), tensor

    parameter_digests(made())
    assert most <= 4
