"""`syncline bench sync` with real engines, which it leaves none of."""

import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest


def writing_in(folder: Path) -> list[Path]:
    """Processes whose output goes to a file there, as an engine's does."""
    found: list[Path] = []
    for output in Path("/proc").glob("[0-9]*/fd/1"):
        with suppress(OSError):  # it has ended meanwhile
            found += [output] if os.readlink(output).startswith(str(folder)) else []
    return found


def measured(folder: Path, *options: str) -> tuple[dict[str, Any], str]:
    """Of such a run that leaves nothing out and no engine behind: its JSON, and what it printed."""
    file = folder / "sync.json"
    words = ["bench", "sync", "--shape", "tiny", "--publishes", "2", "--requests", "4", "--deadline", "500", *options]
    argv = [sys.executable, "-m", "syncline", *words, "--folder", str(folder), "--json", str(file)]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(file.read_text())
    assert found["left_out"] == {}, done.stderr
    assert not writing_in(folder)
    return found, done.stdout


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_bridges_are_measured_beside_their_reference(tmp_path: Path) -> None:
    found, told = measured(tmp_path, "--bridge", "shared", "--bridge", "restart")
    shared, restart = found["results"]
    assert (shared["num_bytes"], restart["num_bytes"] > 0) == (0, True)
    assert [list(one["busy"]) for one in (shared, restart)] == [["recompute", "reuse"], ["recompute"]]
    assert len(shared["decode_shared"]) == len(shared["decode_unshared"]) > 0 < min(shared["decode_unshared"])
    assert found["references"]["tiny"]["plain copy"]["num_bytes"] == pytest.approx(restart["num_bytes"] / 2, rel=0.01)
    assert "tiny plain copy: done" in told


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_learner_of_one_rank_and_one_of_as_many_as_its_engine_are_measured(tmp_path: Path) -> None:
    found, told = measured(tmp_path, "--bridge", "shared", "--bridge", "lora", "--tensor-parallel", "2")
    shared, lora = found["results"]
    assert [(one["bridge"], one["tensor_parallel"]) for one in (shared, lora)] == [("shared", 2), ("lora", 2)]
    assert [len(busy["reports"]) for one in (shared, lora) for busy in one["busy"].values()] == [2, 2, 2]
    assert shared["num_bytes"] == 0 < lora["num_bytes"] < shared["weights_bytes"] < lora["weights_bytes"]
    assert shared["busy"]["reuse"]["decode"] > 0 < len(shared["decode_shared"])
    assert told.index("tiny lora, TP 2: done") < told.index("tiny shared, TP 2: done") < told.index("shared, TP 2, KV")
