"""What a sync is compared with, in the same run: the link itself, and TRL's server mode.

Each runs in processes of its own (`python -m syncline.bench.reference link …`), so that nothing of it is left in the
one that measures. They import what they need, say so, and wait for a line on their standard input to begin.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from syncline.bench.engine import START_SECONDS, Server, free_port, own_cache, seeing

WARM_UP = 3
SECONDS = 150.0
"""Of one reference at most, imports not counted."""
IMPORTED = "imported"
NCCL = '{"backend": "nccl"}'


class Reference:
    """Processes, one a GPU, that wait to begin; the first tells the seconds."""

    def __init__(self, *words: str, gpus: Sequence[int]) -> None:
        argv = [sys.executable, "-m", __name__, *words, "--rank"]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._peers: list[Any] = [
            subprocess.Popen([*argv, str(i)], env=seeing([gpu]), **pipes) for i, gpu in enumerate(gpus)
        ]

    def wait_until_imported(self) -> None:
        """Or dead, which `seconds` tells."""
        for peer in self._peers:
            while (line := peer.stdout.readline()) and line.strip() != IMPORTED:
                pass

    def seconds(self, url: str = "") -> list[float]:
        """Of each repetition, once it has begun; `url` is the server's that it asks, if it asks any."""
        try:
            for peer in self._peers:
                peer.stdin.write(f"{url}\n")
                peer.stdin.flush()
            printed = [peer.communicate(timeout=SECONDS)[0] for peer in self._peers]
        finally:
            for peer in self._peers:
                peer.kill()
                peer.wait()
        if failed := [peer.returncode for peer in self._peers if peer.returncode]:
            raise RuntimeError(f"a process of the reference ended with {failed[0]}")
        return json.loads(printed[0].splitlines()[-1])


def link(num_bytes: int, *, gpus: Sequence[int], repeats: int) -> Reference:
    """Broadcasts of one flat tensor from the first GPU to the others: NCCL, through torch alone."""
    words = ["link", "--bytes", str(num_bytes), "--repeats", str(repeats), "--port", str(free_port())]
    words += ["--world-size", str(len(gpus))]
    return Reference(*words, gpus=gpus)


def trl(model: Path, *, gpu: int, repeats: int) -> Reference:
    """Syncs of TRL's server mode to a `trl_server`."""
    words = ["trl", "--model", str(model), "--repeats", str(repeats), "--port", str(free_port())]
    return Reference(*words, gpus=[gpu])


def trl_server(model: Path, log: Path, *, gpus: Sequence[int], kv_cache_bytes: int) -> Server:
    """The vLLM that TRL syncs, starting."""
    argv = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    argv += ["--weight-transfer-config", NCCL, "--logprobs-mode", "processed_logprobs", "--load-format", "dummy"]
    argv += ["--gpu-memory-utilization", "0.05", "--kv-cache-memory-bytes", str(kv_cache_bytes)]
    argv += ["--tensor-parallel-size", str(len(gpus))]
    return Server(argv, log, gpus=gpus, VLLM_SERVER_DEV_MODE="1", VLLM_CACHE_ROOT=own_cache(log))


def copy_seconds(num_bytes: int, device: Any, repeats: int) -> list[float]:
    """Plain copies of one flat tensor on one device: the memory's own speed."""
    import torch

    source, target = (torch.zeros(num_bytes, dtype=torch.uint8, device=device) for _ in range(2))
    seconds = []
    for _ in range(WARM_UP + repeats):
        started = time.perf_counter()
        target.copy_(source)
        if source.is_cuda:
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return seconds[WARM_UP:]


def _link(args: argparse.Namespace) -> list[float]:
    import torch
    import torch.distributed as dist

    _line()
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    where = f"tcp://127.0.0.1:{args.port}"
    dist.init_process_group("nccl" if on_gpu else "gloo", init_method=where, rank=args.rank, world_size=args.world_size)
    tensor = torch.zeros(args.bytes, dtype=torch.uint8, device=device)
    seconds = []
    for _ in range(WARM_UP + args.repeats):
        started = time.perf_counter()
        dist.broadcast(tensor, src=0)
        if on_gpu:
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    dist.destroy_process_group()
    return seconds[WARM_UP:]


def _trl(args: argparse.Namespace) -> list[float]:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from trl.generation.vllm_client import VLLMClient  # pyright: ignore[reportMissingImports]  (a reference, no need)

    url = _line()
    with torch.device("cuda", 0):
        config = AutoConfig.from_pretrained(args.model)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    metadata = [(name, "bfloat16", list(p.shape)) for name, p in model.named_parameters()]
    client: Any = VLLMClient(base_url=url, group_port=args.port, connection_timeout=START_SECONDS)
    client.init_communicator(device="cuda:0")
    seconds = []
    for _ in range(WARM_UP + args.repeats):
        torch.cuda.synchronize()
        started = time.perf_counter()
        client.update_named_params(metadata, ((name, p.data) for name, p in model.named_parameters()))
        client.reset_prefix_cache()
        seconds.append(time.perf_counter() - started)
    client.close_communicator()
    return seconds[WARM_UP:]


def _line() -> str:
    """Waits for the word to begin, and ends with whoever would give it."""
    print(IMPORTED, flush=True)
    line = sys.stdin.readline()
    return line.strip() if line else sys.exit("nobody said to begin")


def main() -> int:
    parser = argparse.ArgumentParser(description="One party of a reference.")
    parser.add_argument("what", choices=("link", "trl"))
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--repeats", type=int, required=True)
    parser.add_argument("--rank", type=int)
    parser.add_argument("--world-size", type=int)
    parser.add_argument("--bytes", type=int)
    parser.add_argument("--model")
    args = parser.parse_args()
    print(json.dumps(_link(args) if args.what == "link" else _trl(args)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
