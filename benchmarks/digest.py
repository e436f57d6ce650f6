"""How fast the digest that proves a publish reads the weights, beside torch's sum of the same memory.

    python benchmarks/digest.py --shape qwen2.5-1.5b
    python benchmarks/digest.py --shape qwen2.5-1.5b --block 512 1024 4096 --warps 2 4     # the kernel's programs
    python benchmarks/digest.py --shape tiny --device cpu

"kernel" is the device's own time (numpy's on a CPU); "torch's operators" mix the same words a chunk at a time, and do
not count what is not finite; "proof" is what the learner waits for: names, layout and the answer's way back included.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from typing import Any

import torch

from syncline.bench.shapes import SHAPES, build_model
from syncline.bridges import digest as digests
from syncline.bridges.digest import Words
from syncline.bridges.measure import LearnerDigests
from syncline.bridges.receipt import whole

REPEATS = 20
WARM_UP = 3
GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as int64
MIXES = (30, -4658895280553007687), (27, -7723592293110705685)  # 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
CHUNK_WORDS = 1 << 17
"""Of torch's operators: what a CPU's cache holds of their results."""


def main() -> int:
    args = _arguments()
    model = build_model(args.shape, max_length=2048, device=args.device)
    named = list(model.named_parameters())
    num_bytes = sum(parameter.nbytes for _, parameter in named)
    flat = torch.zeros(num_bytes // 8, dtype=torch.int64, device=args.device)
    print(f"{args.shape}: {num_bytes / 1e9:.2f} GB in {len(named)} parameters on {args.device}")
    _print("sum of as many bytes", _milliseconds(flat.sum, args.device), num_bytes)
    batch = [Words.of(name, whole(parameter)) for name, parameter in named]
    for title in _programs(args):
        _print(f"kernel{title}", _milliseconds(digests.prepared(batch), args.device), num_bytes)
    by_torch = partial(_by_torch, [words.bits for words in batch])
    _print("torch's operators", _milliseconds(by_torch, args.device), num_bytes)
    proof = LearnerDigests(lambda model: ((name, whole(p)) for name, p in model.named_parameters()))
    _print("proof", _milliseconds(lambda: proof.of(model), args.device), num_bytes)
    return 0


def _by_torch(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    found = torch.zeros((), dtype=torch.int64, device=tensors[0].device)
    for bits in tensors:
        for start in range(0, len(bits), CHUNK_WORDS):
            chunk = bits[start : start + CHUNK_WORDS].to(torch.int64)
            found += _mixed(chunk, torch.arange(start, start + len(chunk), device=bits.device)).sum()
    return found


def _mixed(words: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """splitmix64's finaliser on int64 (torch shifts arithmetically, so the sign bits are masked off)."""
    x = words ^ (position * GOLDEN)
    for shift, factor in MIXES:
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def _programs(args: argparse.Namespace) -> Iterator[str]:
    """The kernel as it is, or each of the programs asked for, which later digests then have too."""
    if args.device == "cpu" or not (args.block or args.warps):
        yield ""
        return
    from syncline.bridges import digest_kernel

    as_it_is = digest_kernel.BLOCK, digest_kernel.WARPS
    for block, warps in product(args.block or as_it_is[:1], args.warps or as_it_is[1:]):
        digest_kernel.BLOCK, digest_kernel.WARPS = block, warps
        yield f", {block} words, {warps} warps"
    digest_kernel.BLOCK, digest_kernel.WARPS = as_it_is


def _milliseconds(call: Callable[[], Any], device: str) -> float:
    """Of one of many calls that follow each other."""
    for _ in range(WARM_UP):
        call()
    _wait(device)
    started = time.perf_counter()
    for _ in range(REPEATS):
        call()
    _wait(device)
    return (time.perf_counter() - started) / REPEATS * 1e3


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _print(title: str, milliseconds: float, num_bytes: int) -> None:
    print(f"{title:<36}{milliseconds:9.2f} ms {num_bytes / milliseconds / 1e6:9.0f} GB/s", flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Speed of the digest.")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="qwen2.5-1.5b")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--block", type=int, nargs="+", help="words of a program, powers of two")
    parser.add_argument("--warps", type=int, nargs="+", help="of a program")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
