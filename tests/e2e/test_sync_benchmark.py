"""`syncline bench sync` with real engines, which it leaves none of."""

import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest


def writing_in(folder: Path) -> list[Path]:
    """Processes whose output goes to a file there, as an engine's does."""
    found: list[Path] = []
    for output in Path("/proc").glob("[0-9]*/fd/1"):
        with suppress(OSError):  # it has ended meanwhile
            found += [output] if os.readlink(output).startswith(str(folder)) else []
    return found


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_bridges_are_measured_beside_their_reference(tmp_path: Path) -> None:
    file = tmp_path / "sync.json"
    words = ["bench", "sync", "--shape", "tiny", "--bridge", "shared", "--bridge", "restart", "--publishes", "2"]
    words += ["--requests", "4", "--deadline", "500"]
    argv = [sys.executable, "-m", "syncline", *words, "--folder", str(tmp_path), "--json", str(file)]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(file.read_text())
    assert found["left_out"] == {}
    shared, restart = found["results"]
    assert (shared["num_bytes"], restart["num_bytes"] > 0) == (0, True)
    assert [list(one["busy"]) for one in (shared, restart)] == [["recompute", "reuse"], ["recompute"]]
    assert len(shared["decode_shared"]) == len(shared["decode_unshared"]) > 0 < min(shared["decode_unshared"])
    assert found["references"]["tiny"]["plain copy"]["num_bytes"] == pytest.approx(restart["num_bytes"] / 2, rel=0.01)
    assert "tiny plain copy: done" in done.stdout
    assert not writing_in(tmp_path)
