"""Which steps the split's benchmark counts as before a kill, meanwhile and after."""

import pytest
from rollout_split import ALL, BACK, LOST, had_become


@pytest.mark.parametrize(
    ("engines", "expected"),
    [
        ([3, 3], [ALL, ALL]),
        ([3, 2, 2, 3, 3], [ALL, LOST, LOST, BACK, BACK]),
        ([3, 2, 3, 2, 3], [ALL, LOST, BACK, LOST, BACK]),
        ([], []),
    ],
)
def test_steps_by_what_had_become_of_the_engines(engines: list[int], expected: list[str]) -> None:
    assert had_become([{"sync/engines": number} for number in engines], 3) == expected
