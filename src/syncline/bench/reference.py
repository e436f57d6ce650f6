"""What a sync is compared with, in the same run: the link itself, and TRL's server mode.

Each runs in processes of its own (`python -m syncline.bench.reference link …`), so that nothing of it is left in the
one that measures.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from syncline.bench.engine import START_SECONDS, free_port, seeing, stop

WARM_UP = 3
LINK_SECONDS = 120.0
NCCL = '{"backend": "nccl"}'


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


def link_seconds(num_bytes: int, *, gpus: tuple[int, int], repeats: int) -> list[float]:
    """Broadcasts of one flat tensor from the first GPU to the second: NCCL, through torch alone."""
    argv = [sys.executable, "-m", __name__, "link", "--bytes", str(num_bytes), "--repeats", str(repeats)]
    argv += ["--port", str(free_port())]
    peers = [
        subprocess.Popen([*argv, "--rank", str(rank)], env=seeing([gpu]), stdout=subprocess.PIPE, text=True)
        for rank, gpu in enumerate(gpus)
    ]
    try:
        printed = [peer.communicate(timeout=LINK_SECONDS)[0] for peer in peers]
    finally:
        for peer in peers:
            peer.kill()
            peer.wait()
    return json.loads(printed[0])


def trl_seconds(model: Path, *, gpus: tuple[int, int], repeats: int) -> list[float] | None:
    """Syncs of TRL's server mode from the first GPU to a vLLM on the second; `None` where TRL is not installed."""
    if importlib.util.find_spec("trl") is None:
        return None
    port = free_port()
    server = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--port", str(port)]
    server += ["--weight-transfer-config", NCCL, "--logprobs-mode", "processed_logprobs", "--load-format", "dummy"]
    environment = seeing([gpus[1]]) | {"VLLM_SERVER_DEV_MODE": "1"}
    client = [sys.executable, "-m", __name__, "trl", "--model", str(model), "--port", str(port)]
    client += ["--repeats", str(repeats), "--group-port", str(free_port())]
    with (model.parent / "trl-server.log").open("w") as log:
        process = subprocess.Popen(server, stdout=log, stderr=log, env=environment, start_new_session=True)
    try:
        done = subprocess.run(client, env=seeing([gpus[0]]), capture_output=True, text=True, timeout=START_SECONDS)
        if done.returncode:
            raise RuntimeError(f"TRL's client ended with {done.returncode}:\n{done.stderr[-2000:]}")
        return json.loads(done.stdout.splitlines()[-1])
    finally:
        stop(process)


def _link(args: argparse.Namespace) -> list[float]:
    import torch
    import torch.distributed as dist

    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(args.port)}
    dist.init_process_group("nccl" if on_gpu else "gloo", rank=args.rank, world_size=2)
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

    with torch.device("cuda", 0):
        config = AutoConfig.from_pretrained(args.model)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    metadata = [(name, "bfloat16", list(p.shape)) for name, p in model.named_parameters()]
    client: Any = VLLMClient(
        base_url=f"http://127.0.0.1:{args.port}", group_port=args.group_port, connection_timeout=START_SECONDS
    )
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


def main() -> int:
    parser = argparse.ArgumentParser(description="One party of a reference.")
    parser.add_argument("what", choices=("link", "trl"))
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--repeats", type=int, required=True)
    parser.add_argument("--rank", type=int)
    parser.add_argument("--bytes", type=int)
    parser.add_argument("--model")
    parser.add_argument("--group-port", type=int)
    args = parser.parse_args()
    print(json.dumps(_link(args) if args.what == "link" else _trl(args)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
