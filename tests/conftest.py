"""What every test gets: marks from the folder it lies in, no way to a model hub, no clock."""

import os
from pathlib import Path

import hypothesis
import pytest

pytest_plugins = ["outcomes"]
MARKS = {"gpu": pytest.mark.gpu, "e2e": pytest.mark.e2e}


def pytest_configure() -> None:
    os.environ.update(HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1")
    hypothesis.settings.register_profile("untimed", deadline=None)
    hypothesis.settings.load_profile("untimed")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    tests = Path(__file__).parent
    for item in items:
        room = item.path.relative_to(tests).parts[0]
        if room in MARKS:
            item.add_marker(MARKS[room])
