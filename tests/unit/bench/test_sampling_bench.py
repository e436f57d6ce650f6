"""What the sampling benchmark reads off a trace."""

import gzip
import importlib.util
import json
from pathlib import Path
from types import ModuleType

PROGRAM = Path(__file__).parents[3] / "benchmarks" / "kernels_traced.py"


def program() -> ModuleType:
    spec = importlib.util.spec_from_file_location("kernels_traced", PROGRAM)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_moment_counts_once_however_many_kernels_run_in_it(tmp_path: Path) -> None:
    """0 to 300 and 500 to 600 of 1000 us, and a copy at the end."""
    spans = [("gemm", 0, 200), ("norm", 100, 200), ("gemm", 500, 100), ("copy", 950, 50)]
    kernels = [
        {"ph": "X", "cat": "gpu_memcpy" if name == "copy" else "kernel", "name": name, "ts": 5000 + ts, "dur": dur}
        for name, ts, dur in spans
    ]
    others = [{"ph": "X", "cat": "cpu_op", "name": "aten::mm", "ts": 0, "dur": 90000}, {"ph": "M", "name": "thread"}]
    (tmp_path / "worker").mkdir()
    with gzip.open(tmp_path / "worker" / "a.pt.trace.json.gz", "wt") as file:
        json.dump({"traceEvents": kernels + others}, file)
    head, *lines = program().summary(tmp_path)
    assert "1 ms" in head and "45 %" in head
    assert [line.split() for line in lines] == [
        ["30.0", "%", "2", "x", "150.0", "us", "gemm"],
        ["20.0", "%", "1", "x", "200.0", "us", "norm"],
        ["5.0", "%", "1", "x", "50.0", "us", "copy"],
    ]


def test_a_trace_without_a_gpu_says_so(tmp_path: Path) -> None:
    assert program().summary(tmp_path) == [f"no trace in {tmp_path}"]
    (tmp_path / "a.trace.json").write_text(
        json.dumps({"traceEvents": [{"ph": "X", "cat": "cpu_op", "ts": 0, "dur": 1}]})
    )
    assert "no kernels" in program().summary(tmp_path)[0]
