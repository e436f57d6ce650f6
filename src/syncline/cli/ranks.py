"""Starts a learner of several ranks: torch's own launcher (torchrun) in this process, one child a rank.

Who watches: the launcher; the first rank that fails ends the others, and its exit code becomes this process's. Each
rank is tethered to this process, so that however this one is killed, no rank stays behind.
"""

import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from syncline.launch import tether

log = logging.getLogger("syncline.train")


def is_rank() -> bool:
    """Whether this process is a rank already, started by this launcher or by the user's torchrun."""
    return "WORLD_SIZE" in os.environ


def run_ranks(num_ranks: int, argv: Sequence[str], *, module: str = "syncline") -> int:
    """Runs `python -m MODULE ARGV` as `num_ranks` ranks of this host until all have ended. Returns the exit code.

    The ranks meet on a port of the loopback interface that the kernel picks and the launcher holds.
    """
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    tethered = [sys.executable, "-I", "-S", str(Path(tether.__file__)), str(os.getpid())]
    options = [f"--nproc-per-node={num_ranks}", "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0"]
    options += ["--local-addr=127.0.0.1", "--no-python"]
    command = [*options, *tethered, sys.executable, "-m", module, *argv]
    try:
        torchrun.run(torchrun.parse_args(command))
    except ChildFailedError as error:
        rank, failure = _culprit(error)
        print(f"learner rank {rank} of {num_ranks} {_ending(failure)}; the others were ended", file=sys.stderr)
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    except SignalException as error:
        return 128 + error.sigval
    return 0


def _culprit(error: Any) -> tuple[int, Any]:
    """The rank that failed first: one that was killed before one that noticed, and last what the launcher ended."""

    def order(item: tuple[int, Any]) -> tuple[bool, bool, int]:
        code = item[1].exitcode
        return code == -signal.SIGTERM, code > 0, item[1].timestamp

    return min(error.failures.items(), key=order)


def _ending(failure: Any) -> str:
    if failure.exitcode < 0:
        return f"(pid {failure.pid}) was killed by signal {-failure.exitcode}"
    return f"(pid {failure.pid}) ended with exit code {failure.exitcode}"
