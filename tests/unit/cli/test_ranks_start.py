"""The ranks a learner starts: they meet, they end together, and the exit code is the first failure's."""

import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from syncline.launch.groups import process_stat

DEADLINE_SECONDS = 120.0
STAND_IN = """
    import os, signal, sys, time
    from pathlib import Path
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    folder = Path(os.environ["FOLDER"])
    (folder / f"{rank}.pid").write_text(str(os.getpid()))
    way = sys.argv[-1]
    if way == "meet":
        import torch, torch.distributed as dist
        dist.init_process_group("gloo")
        total = torch.tensor(rank + 1)
        dist.all_reduce(total)
        (folder / f"{rank}.sum").write_text(str(int(total)))
        dist.destroy_process_group()
    elif rank == 1 and way != "wait":
        while not (folder / "0.pid").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGKILL) if way == "killed" else sys.exit(6)
    else:
        time.sleep(300)
"""
"""What each rank runs in the place of the learner."""


def alive(pid_file: Path) -> bool:
    stat = process_stat(int(pid_file.read_text()))
    return stat is not None and not stat.zombie


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "the test waited in vain"
        time.sleep(0.05)


@pytest.fixture
def start(tmp_path: Path):
    """`start(way)` runs two ranks of the stand-in under the real launcher."""
    package = tmp_path / "stand_in"
    package.mkdir()
    (package / "stand_in.py").write_text(textwrap.dedent(STAND_IN))
    launch = (
        "from syncline.cli.ranks import run_ranks; exit(run_ranks(2, [__import__('sys').argv[1]], module='stand_in'))"
    )

    def start(way: str) -> subprocess.Popen[str]:
        path = os.pathsep.join([str(package), *sys.path])
        environment = os.environ | {"PYTHONPATH": path, "FOLDER": str(tmp_path)}
        return subprocess.Popen([sys.executable, "-c", launch, way], env=environment, stderr=subprocess.PIPE, text=True)

    return start


def test_ranks_meet_and_end_well(start, tmp_path: Path) -> None:
    process = start("meet")
    _, told = process.communicate(timeout=DEADLINE_SECONDS)
    assert process.returncode == 0, told
    assert [(tmp_path / f"{rank}.sum").read_text() for rank in (0, 1)] == ["3", "3"]


@pytest.mark.parametrize(("way", "code"), [("refuses", 6), ("killed", 137)])
def test_a_rank_that_fails_ends_the_others_and_is_named(start, tmp_path: Path, way: str, code: int) -> None:
    process = start(way)
    _, told = process.communicate(timeout=DEADLINE_SECONDS)
    assert process.returncode == code, told
    assert "learner rank 1 of 2" in told
    wait_until(lambda: not alive(tmp_path / "0.pid"))


def test_killing_the_launcher_leaves_no_rank_behind(start, tmp_path: Path) -> None:
    process = start("wait")
    try:
        wait_until((tmp_path / "1.pid").exists)
        wait_until((tmp_path / "0.pid").exists)
    finally:
        process.kill()
        process.communicate(timeout=60)
    wait_until(lambda: not alive(tmp_path / "1.pid"))
    wait_until(lambda: not alive(tmp_path / "0.pid"))
