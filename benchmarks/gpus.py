"""The GPUs of a benchmark: what `nvidia-smi` says of them meanwhile, and one made as small as another model of GPU."""

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

BALLAST = """
import sys, torch
_, total = torch.cuda.mem_get_info()
held = torch.empty(max(0, total - int(sys.argv[1])), dtype=torch.uint8, device="cuda")
print(held.numel(), flush=True)
sys.stdin.read()
"""


@contextmanager
def watched(gpus: Sequence[str], asked: str) -> Iterator[list[float]]:
    """Samples of `asked` (`utilization.gpu`, `memory.used`), 5 a second of each of `gpus`, as `nvidia-smi` names them,
    one after the other; in the list when the body has ended. None without `nvidia-smi`."""
    samples: list[float] = []
    if not gpus or not shutil.which("nvidia-smi"):
        yield samples
        return
    query = (f"--query-gpu={asked}", "--format=csv,noheader,nounits", "-lms=200")
    with tempfile.TemporaryFile("w+") as told:
        process = subprocess.Popen(("nvidia-smi", "-i", ",".join(gpus), *query), stdout=told)
        try:
            yield samples
        finally:
            process.kill()
            process.wait()
        told.seek(0)
        samples += [float(line) for line in told.read().splitlines() if line.strip().isdigit()]


@contextmanager
def limited_to(gigabytes: float | None) -> Iterator[int]:
    """Of the first GPU, another process holds what is beyond `gigabytes`, so that all others together have these.
    Yields the bytes it holds; what its context takes comes from the others'."""
    if gigabytes is None:
        yield 0
        return
    argv = (sys.executable, "-c", BALLAST, str(int(gigabytes * 1e9)))
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        told = process.stdout.readline()
        if not told:
            raise RuntimeError(f"torch sees no GPU, or not all beyond {gigabytes:g} GB of it is free")
        try:
            yield int(told)
        finally:
            process.kill()
