"""`syncline merge --base B --adapter A --out O`: an adapter merged into its base, safetensors, proved by logits."""

import argparse
import gc
import json
from pathlib import Path

from syncline.config.offline import OfflineConfig

MODEL = "model"


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
        args.base, args.adapter, args.out, dtype=args.dtype, tolerance=args.tolerance, any_base_name=args.any_base_name
    )
    print(f"{args.out}: {found.kind} of {found.num_adapted} layers merged, digest {found.digest}")
    print(
        f"mean |Δ logprob| {found.mean_abs_diff:.2e} on {found.num_tokens_compared} tokens (tolerance "
        f"{found.tolerance:g}; the adapter itself changes {found.adapter_effect:.2e})"
    )
    return 0


def model_folder(config: OfflineConfig) -> Path:
    """The folder of the model that a pipeline is about: the one the file names, or what its `merge` makes of it."""
    import torch

    from syncline.learner.model import assets_folder
    from syncline.offline.merge import SUMMARY_FILE, merge
    from syncline.offline.stage import Notes, Stage, run_stage, weights_digest

    asked, base = config.merge, assets_folder(config.model.path)
    if asked is None:
        return base
    inputs = {"base": weights_digest(base), "adapter": weights_digest(Path(asked.adapter))}
    known = asked.model_dump(mode="json", exclude={"adapter"}) | {"dtype": config.model.dtype}

    def work(notes: Notes) -> None:
        out = notes.folder / MODEL
        if not out.exists():  # else it is whole, and an earlier attempt was killed while its files were digested
            merge(
                config.model.path,
                Path(asked.adapter),
                out,
                dtype=config.model.dtype,
                tolerance=asked.tolerance,
                any_base_name=asked.any_base_name,
            )
            gc.collect()
            torch.cuda.empty_cache()  # engines want it next; nothing without a GPU
        notes.facts |= json.loads((out / SUMMARY_FILE).read_text())

    done = run_stage(
        Path(config.run.dir), Stage("merge", known, inputs), work, outputs=(f"{MODEL}/{SUMMARY_FILE}", MODEL)
    )
    return done.folder / MODEL
