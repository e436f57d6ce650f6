"""A process started by hand uses the GPUs that its configuration names, not the first ones it sees."""

import os

import pytest

from syncline.errors import ConfigError
from syncline.launch.plan import see_only


@pytest.mark.parametrize(
    ("visible", "devices", "expected"),
    [
        pytest.param("0,1,2,3", [2], "2", id="one of all"),
        pytest.param("4,5,6", [2, 0], "6,4", id="in the order named, of those visible"),
        pytest.param("3", [2], "3", id="started with its own already"),
        pytest.param("0,1,2,3", [0], "0", id="the first, which others need not see"),
    ],
)
def test_the_named_gpus_alone_are_seen(
    monkeypatch: pytest.MonkeyPatch, visible: str, devices: list[int], expected: str
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    see_only("engine.devices", devices, device="auto")
    assert os.environ["CUDA_VISIBLE_DEVICES"] == expected


def test_a_run_on_the_cpu_hides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    see_only("learner.devices", [1], device="cpu")
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,1,2,3"


def test_gpus_that_are_not_there_are_refused_by_field(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with pytest.raises(ConfigError, match=r"engine\.devices: \[5\] is not among the 2 GPUs"):
        see_only("engine.devices", [5], device="auto")
