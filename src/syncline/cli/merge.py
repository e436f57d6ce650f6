"""`syncline merge --base B --adapter A --out O`: an adapter merged into its base, safetensors, proved by logits."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base", required=True, help="a folder or a hub name")
    parser.add_argument("--adapter", type=Path, required=True, help="a PEFT folder: LoRA, rsLoRA or DoRA")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--tolerance", type=float, help="mean |Δ logprob|; default 1e-4 in float32, 0.02 in bfloat16")
    parser.add_argument("--any-base-name", action="store_true", help="the adapter's config may name another base")


def run(args: argparse.Namespace) -> int:
    from syncline.errors import ConfigError
    from syncline.offline.merge import merge

    if args.out.exists():
        raise ConfigError([f"--out: {args.out} is there already; name another folder, or remove it"])
    found = merge(
        args.base,
        args.adapter,
        args.out,
        dtype=args.dtype,
        tolerance=args.tolerance,
        any_base_name=args.any_base_name,
    )
    print(f"{args.out}: {found.kind} of {found.num_adapted} layers merged, digest {found.digest}")
    print(
        f"mean |Δ logprob| {found.mean_abs_diff:.2e} on {found.num_tokens_compared} tokens (tolerance "
        f"{found.tolerance:g}; the adapter itself changes {found.adapter_effect:.2e})"
    )
    return 0
