"""Which moments 8 bits hold, and what is said where their code is not installed."""

from importlib.machinery import ModuleSpec
from typing import Any

import pytest

from syncline.config import eight_bits, resolve
from syncline.config.eight_bits import block_of, bytes_per_element, missing_torchao


@pytest.mark.parametrize(
    ("shape", "block"),
    [((896, 3584), 256), ((4864, 896), 128), ((64, 64), 64), ((512, 8), None), ((8, 96), None), ((4096,), None)],
)
def test_the_largest_block_that_divides_a_row_is_taken(shape: tuple[int, ...], block: int | None) -> None:
    assert block_of(shape) == block


def test_rows_of_several_dimensions_count_all_of_them() -> None:
    assert block_of((8, 3, 14, 14)) is None, "588 is no multiple of 16"
    assert block_of((8, 3, 16, 16)) == 256
    assert (bytes_per_element(3584), bytes_per_element(896), bytes_per_element(588)) == (2.03125, 2.0625, 8.0)


@pytest.mark.parametrize(
    ("moments", "installed", "refused"), [("int8", False, True), ("int8", True, False), ("float32", False, False)]
)
def test_a_missing_package_is_told_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch, moments: str, installed: bool, refused: bool
) -> None:
    monkeypatch.setattr(eight_bits, "find_spec", lambda name: ModuleSpec(name, None) if installed else None)
    values: dict[str, Any] = {
        "run": {"dir": "runs/x", "num_steps": 4, "groups_per_step": 16, "rollouts_per_group": 8},
        "model": {"path": "m", "max_length": 512},
        "sampling": {"max_tokens": 256},
        "environments": [{"task": "arithmetic"}],
        "learner": {"token_budget": 512, "optimizer": {"moments": moments}},
    }
    faults = missing_torchao(resolve(values))
    assert [fault.partition(";")[0] for fault in faults] == (
        ["learner.optimizer.moments: 'int8' needs the package torchao"] if refused else []
    )
