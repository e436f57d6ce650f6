"""Where the learner's memory goes in one whole optimizer step, and whether it stays under a limit on a larger GPU.

    python benchmarks/learner_memory.py --shape qwen2.5-7b --limit-gb 80 --moments int8 --gradients bfloat16

The limit is torch's own for the process: what would go beyond it fails as on a GPU of that size.
"""

import argparse
import sys

import torch
from learning import LOSS, Load, built, step_of

from syncline.bench.shapes import SHAPES
from syncline.config.schema import Learner, Lora, Optimizer, Recomputation
from syncline.learner.advantages import group_advantages
from syncline.learner.model import add_lora, run_layers_as, trainable_parameters
from syncline.learner.optim import SplitMasterAdamW, accumulate_fp32
from syncline.observe.metrics import Metrics


def main() -> int:
    args = _arguments()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.limit_gb and device.type == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, args.limit_gb * 1e9 / total))
    load = Load.equal(prompt=args.prompt, completion=args.completion, num_rollouts=args.rollouts, rollouts_per_group=4)
    running = _running(args)
    rows: list[tuple[str, float]] = []
    model = built(args.shape, load, running, device)
    if args.lora_rank:
        model = add_lora(model, Lora(rank=args.lora_rank, alpha=2.0 * args.lora_rank))
    run_layers_as(running, model, device=device)
    trained = sum(p.numel() for _, p in trainable_parameters(model))
    rows.append(("weights", _held(device)))
    if running.gradients == "float32":
        accumulate_fp32(model)
    optimizer = SplitMasterAdamW(trainable_parameters(model), running.optimizer)
    rows.append(("optimizer", _held(device) - rows[0][1]))
    step, report = step_of(running, load, device), Metrics()
    advantages = group_advantages(load.groups, LOSS.scale_advantages)
    for number in range(2):  # the second has everything allocated
        report = Metrics()
        step.backward(model, load.groups, advantages, report, optimizer=optimizer, step=number)
        if number == 0:
            rows.append(("gradients", _held(device) - sum(size for _, size in rows)))
        step.apply_gradients(optimizer, number, report)
    _print(args, rows, trained, report.reduced())
    return 0


def _print(args: argparse.Namespace, rows: list[tuple[str, float]], trained: int, report: dict[str, float]) -> None:
    print(f"\n{args.shape}, {trained} trained parameters, micro-batches of {args.token_budget} tokens")
    for name, size in rows:
        print(f"{name:<34}{size / 1e9:>10.2f} GB{size / trained:>8.2f} bytes a trained parameter")
    peak = report.get("memory/microbatch_peak_bytes", 0.0)
    print(f"{'activations':<34}{(peak - sum(size for _, size in rows)) / 1e9:>10.2f} GB")
    print(f"{'peak of a micro-batch':<34}{peak / 1e9:>10.2f} GB")
    if torch.cuda.is_available():
        reserved = torch.cuda.max_memory_reserved() / 1e9
        limit = f" of {args.limit_gb:g} GB: {args.limit_gb - reserved:.2f} GB are left" if args.limit_gb else ""
        print(f"{'reserved by torch at most':<34}{reserved:>10.2f} GB{limit}")
    print(f"loss {report['loss']:.4g}, gradient norm {report['grad_norm']:.4g}")


def _held(device: torch.device) -> float:
    return float(torch.cuda.memory_allocated()) if device.type == "cuda" else 0.0


def _running(args: argparse.Namespace) -> Learner:
    return Learner(
        loss=LOSS,
        token_budget=args.token_budget,
        recomputation=Recomputation(what=args.recompute),
        gradients=args.gradients,
        optimizer=Optimizer(
            moments=args.moments, in_backward=args.in_backward, max_grad_norm=None if args.in_backward else 1.0
        ),
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Memory of one optimizer step.")
    parser.add_argument("--shape", choices=sorted(SHAPES), required=True)
    parser.add_argument("--limit-gb", type=float)
    parser.add_argument("--lora-rank", type=int)
    parser.add_argument("--moments", choices=("float32", "int8"), default="float32")
    parser.add_argument("--gradients", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--in-backward", action="store_true")
    parser.add_argument("--recompute", choices=("none", "selective", "attention", "full"), default="full")
    parser.add_argument("--token-budget", type=int, default=8192)
    parser.add_argument("--rollouts", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--completion", type=int, default=896)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
