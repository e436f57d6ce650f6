"""Trained tokens a second of a learner on 1, 2, 4 GPUs (FSDP), the scaling, and each rank's peak memory.

    python benchmarks/fsdp_scaling.py --shape qwen2.5-7b --ranks 1 2 4

Every rank has as many tokens, whatever their number (weak scaling), in whole optimizer steps of the product's own
`Step`. One rank is the learner without FSDP. A CPU does the shape `tiny`: `--shape tiny --ranks 1 2 --rollouts 8
--completion 32`.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from typing import Any


def main() -> int:
    args = _arguments()
    if "WORLD_SIZE" in os.environ:
        return _rank(args)
    until, readings = time.monotonic() + args.deadline, []
    for number in args.ranks:
        try:
            readings.append(json.loads(_started(number, until - time.monotonic()).splitlines()[-1]))
        except (subprocess.TimeoutExpired, KeyboardInterrupt) as end:
            print(f"{number} ranks and what follows left out: {type(end).__name__}", file=sys.stderr)
            break
        except subprocess.CalledProcessError as failed:
            print(f"{number} ranks left out: exit code {failed.returncode}\n{failed.stdout[-3000:]}", file=sys.stderr)
    if readings:
        _print(args, readings)
    return 0 if len(readings) == len(args.ranks) else 1


def _started(number: int, seconds: float) -> str:
    """The same command on so many ranks of this host; its last line is the reading."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={number}", "--rdzv-backend=c10d"]
    command += ["--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1", *sys.argv]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as run:
        try:
            said, _ = run.communicate(timeout=max(1.0, seconds))
        except BaseException:
            run.terminate()  # which torchrun passes on to its ranks
            raise
    if run.returncode:
        raise subprocess.CalledProcessError(run.returncode, command, said)
    return said


def _rank(args: argparse.Namespace) -> int:
    import torch

    from syncline.bridges.ranks import DATA_PARALLEL
    from syncline.learner.distributed import joined_ranks, rank_device

    device = rank_device(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    with joined_ranks(device, timeout_seconds=600, dimension=DATA_PARALLEL) as ranks:
        reading = _measured(args, ranks, device)
        if ranks.is_first:
            print(json.dumps(reading), flush=True)
    return 0


def _measured(args: argparse.Namespace, ranks: Any, device: Any) -> dict[str, Any]:
    """The shortest of the steps after the first, which compiles and allocates."""
    from learning import LOSS, Load

    from syncline.learner.advantages import group_advantages
    from syncline.learner.model import checkpoint_wholes, trainable_parameters
    from syncline.learner.optim import SplitMasterAdamW, accumulate_fp32

    sizes = {"prompt": args.prompt, "num_rollouts": args.rollouts * ranks.world_size, "rollouts_per_group": 4}
    if args.shortest:
        load = Load.mixed(bounds=(args.shortest, args.completion), **sizes)
    else:
        load = Load.equal(completion=args.completion, **sizes)
    model, step, flops = _built(args, load, ranks, device)
    if args.gradients == "float32":
        accumulate_fp32(model)
    optimizer = SplitMasterAdamW(trainable_parameters(model), step.config.optimizer, ranks=ranks)
    advantages = group_advantages(load.groups, LOSS.scale_advantages)
    learning, gathering, reports = [], [], []
    for _ in range(args.steps + 1):
        learning.append(
            _timed(lambda: reports.append(_stepped(step, model, load, advantages, optimizer)), device, ranks)
        )
        gathering.append(_timed(lambda: deque(checkpoint_wholes(model, ranks), maxlen=0), device, ranks))
    return {
        "ranks": ranks.world_size,
        "tokens": load.num_tokens,
        "flops": flops,
        "seconds": min(learning[1:]),
        "gathering_seconds": min(gathering[1:]),
        "microbatches": int(reports[-1]["step/num_microbatches"]),
        "loss": reports[0]["loss"],
        "grad_norm": reports[0]["grad_norm"],
        "peaks": [f"{peak / 1e9:.1f}" for peak in ranks.gathered(_peak(device))],
    }


def _built(args: argparse.Namespace, load: Any, ranks: Any, device: Any) -> tuple[Any, Any, float]:
    """Random weights of the shape, the same on every rank, sharded if there are several."""
    from dataclasses import replace

    import torch
    from learning import LOSS, built, step_of, useful_flops

    from syncline.config.schema import Learner, Optimizer, Recomputation
    from syncline.learner.data_parallel import shard_over
    from syncline.learner.model import run_layers_as

    running = Learner(
        loss=LOSS,
        token_budget=args.token_budget,
        recomputation=Recomputation(what=args.recompute),
        compile=args.compile,
        gradients=args.gradients,
        optimizer=Optimizer(moments=args.moments),
    )
    model = built(args.shape, load, running, device)
    flops = useful_flops(model, load)
    if ranks.split_data:
        shard_over(model, ranks, sum_in=torch.float32 if args.gradients == "float32" else None)
    run_layers_as(running, model, device=device, ranks=ranks)
    return model, replace(step_of(running, load, device), ranks=ranks), flops


def _stepped(step: Any, model: Any, load: Any, advantages: Any, optimizer: Any) -> dict[str, float]:
    from syncline.observe.metrics import Metrics

    report = Metrics()
    step.backward(model, load.groups, advantages, report, optimizer=optimizer, step=0)
    step.apply_gradients(optimizer, 0, report)
    return report.reduced()


def _timed(work: Callable[[], Any], device: Any, ranks: Any) -> float:
    """Seconds until every rank has done it."""
    ranks.gathered(None)
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)
    ranks.gathered(None)
    return time.perf_counter() - started


def _peak(device: Any) -> int:
    """Of the last micro-batch and the step after it, which are as large as any."""
    import torch

    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def _print(args: argparse.Namespace, readings: list[dict[str, Any]]) -> None:
    print(f"\n{args.shape}, micro-batches of {args.token_budget} tokens, recomputed: {args.recompute}\n")
    print(
        "| ranks | tokens a step | micro-batches a rank | step s | trained tokens/s | scaling | TFLOP/s a rank "
        "| gather s | peak GB by rank |\n|---|---|---|---|---|---|---|---|---|"
    )
    one = readings[0]["tokens"] / readings[0]["seconds"] / readings[0]["ranks"]
    for r in readings:
        rate = r["tokens"] / r["seconds"]
        flops = r["flops"] / r["seconds"] / r["ranks"] / 1e12
        print(
            f"| {r['ranks']} | {r['tokens']} | {r['microbatches']} | {r['seconds']:.2f} | {rate:.0f} "
            f"| {rate / r['ranks'] / one:.2f} | {flops:.1f} | {r['gathering_seconds']:.2f} | {' '.join(r['peaks'])} |"
        )
    print(
        f"\nscaling: tokens/s a rank, over those of {readings[0]['ranks']}. gather: all parameters, one by one, as a "
        "publish does."
    )


def _arguments() -> argparse.Namespace:
    from syncline.bench.shapes import SHAPES

    parser = argparse.ArgumentParser(description="Scaling of the learner over data-parallel ranks.")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="qwen2.5-7b")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--rollouts", type=int, default=64, help="of each rank")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--completion", type=int, default=896)
    parser.add_argument("--shortest", type=int, help="mixed lengths, from this to --completion")
    parser.add_argument("--token-budget", type=int, default=16384)
    parser.add_argument("--recompute", choices=("none", "selective", "attention", "full"), default="full")
    parser.add_argument("--compile", choices=("auto", "on", "off"), default="auto")
    parser.add_argument("--gradients", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--moments", choices=("float32", "int8"), default="float32")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--deadline", type=float, default=1800.0, help="seconds until the table of what is known then")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
