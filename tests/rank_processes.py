"""Functions run on several ranks: real processes of this machine that meet, with a deadline."""

import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from syncline.bridges.ranks import TENSOR_PARALLEL
from syncline.launch.ports import lease_ports
from syncline.learner.distributed import joined_ranks, rank_device

DEADLINE_SECONDS = 180.0
"""For all together; on a busy host a rank takes a minute to begin."""


def on_ranks(
    function: Callable[..., Any],
    *args: Any,
    world_size: int = 2,
    device: str = "cpu",
    dimension: str = TENSOR_PARALLEL,
) -> list[Any]:
    """`function(ranks, *args)` on every rank at once; what each returned, by rank. A rank's failure fails the test."""
    context = multiprocessing.get_context("spawn")
    with lease_ports({"port": ("127.0.0.1", 0)}) as ports, tempfile.TemporaryDirectory() as folder:
        answers = [Path(folder) / str(rank) for rank in range(world_size)]
        processes = [
            context.Process(
                target=_run,
                args=(_environment(rank, world_size, ports["port"]), device, dimension, answers[rank], function, args),
            )
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        deadline = time.monotonic() + DEADLINE_SECONDS
        try:
            for process in processes:
                process.join(max(0.0, deadline - time.monotonic()))
        finally:
            for process in processes:
                process.kill()
                process.join()
        return [_answer(rank, path) for rank, path in enumerate(answers)]


def _answer(rank: int, path: Path) -> Any:
    assert path.exists(), f"rank {rank} did not answer within {DEADLINE_SECONDS:g} s"
    error, result = torch.load(path, weights_only=False)
    assert error is None, f"rank {rank}:\n{error}"
    return result


def _environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """What torchrun would set."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
    }


def _run(
    environment: dict[str, str],
    device: str,
    dimension: str,
    answer: Path,
    function: Callable[..., Any],
    args: tuple,
) -> None:
    os.environ |= environment
    torch.set_num_threads(1)
    try:
        with joined_ranks(rank_device(torch.device(device)), timeout_seconds=60, dimension=dimension) as ranks:
            outcome = (None, function(ranks, *args))
    except Exception:
        outcome = (traceback.format_exc(), None)
    torch.save(outcome, answer)
