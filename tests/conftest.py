"""What every test gets: marks from the folder it lies in, no way to a model hub, no clock."""

import os
from collections.abc import Iterator
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


@pytest.fixture
def cut_name() -> Iterator[None]:
    """This process has a name that the kernel, which keeps 15 bytes, has cut inside a character."""
    comm = Path("/proc/self/comm")
    before = comm.read_bytes().strip()
    comm.write_bytes("тренировка".encode())
    yield
    comm.write_bytes(before)
