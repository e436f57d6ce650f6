"""What a publish over the `broadcast` bridge takes, part by part, beside the link it runs over.

    python benchmarks/broadcast.py --shape qwen2.5-0.5b --shape qwen2.5-7b        # two GPUs: learner 0, engine 1
    python benchmarks/broadcast.py --shape narrow                                  # on a CPU, to see that it runs

The engine is a real one; every publish changes every weight. The link is a plain broadcast of one flat tensor of the
same bytes, between the same two devices, in the same run. Absolute times mean something on GPUs only.
"""

import argparse
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from shapes import SHAPES, build_model, make_folder, make_model

from syncline.bridges.broadcast import BroadcastBridge
from syncline.bridges.collective import Deadline, Group, Seat, listen
from syncline.config.schema import Bridge
from syncline.engines.client import EngineController
from syncline.protocols import SyncReport

LEARNER_GPU, ENGINE_GPU = 0, 1
WARM_UP = 3
TIMEOUT_SECONDS = 120.0
MAX_LENGTH = 2048
PARTS = ("digest", "connect", "pause", "transfer", "prove", "resume")


def main() -> int:
    parser = argparse.ArgumentParser(description="A publish over the broadcast bridge, part by part.")
    parser.add_argument("--shape", choices=sorted(SHAPES), action="append", required=True, dest="shapes")
    parser.add_argument("--publishes", type=int, default=10)
    parser.add_argument("--bucket-bytes", type=int, default=Bridge().bucket_bytes)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "syncline-broadcast")
    parser.add_argument("--json", type=Path, help="write the numbers there too")
    parser.add_argument("--link-peer", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.link_peer:
        link_peer(**args.link_peer)
        return 0
    if torch.cuda.device_count() == 1:
        parser.error("NCCL broadcasts between two GPUs, and this machine shows one")
    results = [measure(shape, args) for shape in args.shapes]
    print_table(results)
    if args.json:
        args.json.write_text(json.dumps(results))
    return 0


def measure(shape: str, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of every part of every publish, and of the link."""
    device = torch.device("cuda", LEARNER_GPU) if torch.cuda.is_available() else torch.device("cpu")
    model = build_model(shape, max_length=MAX_LENGTH, device=str(device))
    num_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    link = link_seconds(num_bytes, device, repeats=args.publishes)
    config = Bridge(name="broadcast", bucket_bytes=args.bucket_bytes, timeout_seconds=TIMEOUT_SECONDS)
    with running_engine(shape, args.folder) as engine:
        bridge = BroadcastBridge([engine], config, export=lambda m: m.named_parameters())
        started = time.perf_counter()
        bridge.attach(model)
        attach = time.perf_counter() - started
        reports = [publish(bridge, model, version) for version in range(WARM_UP + args.publishes)][WARM_UP:]
        bridge.close()
    return {
        "shape": shape,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": str(torch.__version__),
        "bytes": num_bytes,
        "bucket_bytes": args.bucket_bytes,
        "link_seconds": link,
        "attach_seconds": attach,
        "seconds": [report.seconds for report in reports],
        "pause_seconds": [report.pause_seconds for report in reports],
        "parts_seconds": {part: [report.parts_seconds[part] for report in reports] for part in PARTS},
    }


@torch.no_grad()
def publish(bridge: BroadcastBridge, model: torch.nn.Module, version: int) -> SyncReport:
    for parameter in model.parameters():
        parameter.neg_().add_(0.01)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return bridge.publish(model, policy_version=version)


def link_seconds(num_bytes: int, device: torch.device, *, repeats: int) -> list[float]:
    """Broadcasts of one flat tensor to a process on the engine's device."""
    store, port = listen("127.0.0.1", timeout_seconds=TIMEOUT_SECONDS)
    seat = Seat("127.0.0.1", port, rank=0, size=2, generation="link")
    peer = {"seat": asdict(seat) | {"rank": 1}, "num_bytes": num_bytes, "repeats": repeats}
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": visible_gpu(ENGINE_GPU)}
    argv = [sys.executable, __file__, "--shape", "narrow", "--link-peer", json.dumps(peer)]
    with subprocess.Popen(argv, env=environment) as process:
        deadline = Deadline.after(TIMEOUT_SECONDS)
        group = Group.host(seat, device, store=store, deadline=deadline, watch=peer_watch(process))
        seconds = broadcasts(group, torch.ones(num_bytes, dtype=torch.uint8, device=device), WARM_UP + repeats)
        group.leave("measured").result()
    return seconds[WARM_UP:]


def link_peer(seat: dict[str, Any], num_bytes: int, repeats: int) -> None:
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    group = Group.join(Seat(**seat), device, deadline=Deadline.after(TIMEOUT_SECONDS))
    received = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    broadcasts(group, received, WARM_UP + repeats)
    if not bool((received == 1).all()):
        raise SystemExit("the link's reference did not arrive")
    group.leave("").result()


def broadcasts(group: Group, tensor: torch.Tensor, repeats: int) -> list[float]:
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        group.broadcast(tensor).wait()
        if tensor.is_cuda:
            torch.cuda.synchronize(tensor.device)
        seconds.append(time.perf_counter() - started)
    return seconds


def peer_watch(process: subprocess.Popen[bytes]) -> Callable[[], None]:
    def watch() -> None:
        if process.poll() is not None:
            raise SystemExit(f"the link's other end ended with {process.returncode}")

    return watch


def visible_gpu(index: int) -> str:
    """What CUDA_VISIBLE_DEVICES calls the machine's GPU `index` in this run; empty on a CPU."""
    if not torch.cuda.is_available():
        return ""
    names = os.environ.get("CUDA_VISIBLE_DEVICES")
    return names.split(",")[index] if names else str(index)


@contextmanager
def running_engine(shape: str, folder: Path) -> Iterator[EngineController]:
    """`syncline serve` on the engine's device, ready; ended by pid."""
    on_gpu = torch.cuda.is_available()
    model = folder / shape
    if not (model / "config.json").exists():
        (make_folder if on_gpu else make_model)(shape, model, max_length=MAX_LENGTH)
    file = folder / f"{shape}.yaml"
    file.write_text(yaml.safe_dump(values(model, folder / "run", on_gpu=on_gpu)))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    argv = [sys.executable, "-m", "syncline", "serve", str(file), "--port", str(port)]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": visible_gpu(ENGINE_GPU)}
    log = folder / f"{shape}.log"
    with log.open("w") as output:
        process = subprocess.Popen(argv, stdout=output, stderr=output, env=environment, start_new_session=True)
    engine = EngineController(f"http://127.0.0.1:{port}", start_timeout_seconds=300)
    try:
        engine.wait_until_ready(timeout_seconds=300)
        yield engine
    except BaseException:
        print(f"the engine's log ends with:\n{log.read_text()[-3000:]}", file=sys.stderr)
        raise
    finally:
        engine.close()
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)


def values(model: Path, run_dir: Path, *, on_gpu: bool) -> dict[str, Any]:
    return {
        "run": {"dir": str(run_dir), "num_steps": 1, "groups_per_step": 1},
        "model": {"path": str(model), "max_length": MAX_LENGTH, "dtype": "bfloat16"},
        "sampling": {"max_tokens": 16},
        "environments": [{"task": "even_tokens:EvenTokens"}],
        "engine": {"extra": {"load_format": "dummy"} if on_gpu else {}},
        "bridge": {"name": "broadcast"},
    }


def print_table(results: list[dict[str, Any]]) -> None:
    """Milliseconds, the median and the slowest of the publishes; the targets are twice the link and 5 ms, and 40 ms
    of pause at 0.5B, 120 at 7B."""
    for result in results:
        link = statistics.median(result["link_seconds"])
        gigabytes = result["bytes"] / 1e9
        print(
            f"\n{result['shape']}, {gigabytes:.2f} GB, buckets of {result['bucket_bytes'] / 2**20:.0f} MiB, "
            f"{len(result['seconds'])} publishes, {result['device']}, torch {result['torch']}"
        )
        print(f"{'':<28}{'p50 ms':>10}{'max ms':>10}{'GB/s':>10}")
        rows = [("link: one flat broadcast", result["link_seconds"])]
        rows += [(f"  {part}", result["parts_seconds"][part]) for part in PARTS]
        rows += [("engine paused", result["pause_seconds"]), ("publish", result["seconds"])]
        for title, seconds in rows:
            median = statistics.median(seconds)
            speed = f"{gigabytes / median:10.1f}" if title in (rows[0][0], "  transfer") else ""
            print(f"{title:<28}{1e3 * median:10.2f}{1e3 * max(seconds):10.2f}{speed}")
        transfer = statistics.median(result["parts_seconds"]["transfer"])
        target = 2 * link + 0.005
        print(f"{'transfer target':<28}{1e3 * target:10.2f}  {'met' if transfer <= target else 'MISSED'}")
        print(f"{'attach':<28}{1e3 * result['attach_seconds']:10.2f}")


if __name__ == "__main__":
    sys.exit(main())
