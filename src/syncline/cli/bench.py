"""`syncline bench sync`: what a publish costs over each bridge, beside the link and TRL, in one run."""

import argparse
import json
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from syncline.errors import ConfigError

if TYPE_CHECKING:
    from syncline.bench.sync import Case, Result

BRIDGES = ("shared", "broadcast", "lora", "restart")
ON_TWO_GPUS = ("broadcast",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=("sync",))
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--shape", action="append", help="random weights of a known shape, such as qwen2.5-0.5b")
    source.add_argument("--model", type=Path, help="a model folder")
    parser.add_argument("--bridge", action="append", choices=BRIDGES, help="default: all this machine can run")
    parser.add_argument("--publishes", type=int, default=20)
    parser.add_argument("--requests", type=int, default=64, help="streams that run during the publishes")
    parser.add_argument("--lora-rank", type=int, default=32, help="of the lora bridge's adapter")
    parser.add_argument(
        "--changed", type=float, default=1.0, help="share of values each publish changes; below 1: sparse"
    )
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.4)
    parser.add_argument("--no-trl", action="store_true", help="leave TRL's server mode out even where it is installed")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "syncline-bench")
    parser.add_argument("--json", type=Path, help="write every number there too")


def run(args: argparse.Namespace) -> int:
    import torch

    from syncline.bench.sync import measure, references
    from syncline.bench.table import as_json, sync_table
    from syncline.bridges.ranks import ONE_RANK
    from syncline.cli.bridge import build_bridge

    if not 0 < args.changed <= 1:
        raise ConfigError([f"--changed: {args.changed:g} is no share; give one above 0 and up to 1"])
    num_gpus = torch.cuda.device_count()
    bridges = args.bridge or [name for name in BRIDGES if num_gpus != 1 or name not in ON_TWO_GPUS]
    if num_gpus == 1 and (alone := [name for name in bridges if name in ON_TWO_GPUS]):
        raise ConfigError([f"--bridge: {alone[0]!r} sends from one GPU to another, and this machine shows one"])
    args.folder.mkdir(parents=True, exist_ok=True)
    results: list[Result] = []
    compared: dict[str, dict[str, list[float]]] = {}
    for shape, model in _models(args):
        cases = [_case(args, name, shape=shape, model=model, num_gpus=num_gpus) for name in bridges]
        results += [measure(case, partial(build_bridge, ranks=ONE_RANK)) for case in cases]
        weights_bytes = results[-1].weights_bytes
        far = next((case for case in cases if case.learner_gpu != case.engine_gpu), cases[0])
        compared[shape] = references(far, num_bytes=weights_bytes, with_trl=not args.no_trl)
    print("\n".join(sync_table(results, compared)))
    if args.json:
        args.json.write_text(json.dumps(as_json(results, compared)))
    return 0


def _models(args: argparse.Namespace) -> list[tuple[str, Path]]:
    """Name and folder of each model; those of known shapes are made once."""
    from syncline.bench.shapes import SHAPES, make_model
    from syncline.bench.sync import MAX_LENGTH

    if args.model:
        return [(args.model.name, args.model)]
    if unknown := [shape for shape in args.shape if shape not in SHAPES]:
        raise ConfigError([f"--shape: {name!r} is not one of {', '.join(sorted(SHAPES))}" for name in unknown])
    models = [(shape, args.folder / shape) for shape in args.shape]
    for shape, folder in models:
        if not (folder / "config.json").exists():
            make_model(shape, folder, max_length=MAX_LENGTH)
    return models


def _case(args: argparse.Namespace, bridge: str, *, shape: str, model: Path, num_gpus: int) -> "Case":
    from syncline.bench.sync import Case

    return Case(
        bridge=bridge,
        model=model,
        shape=shape,
        folder=args.folder,
        publishes=args.publishes,
        num_requests=args.requests,
        lora_rank=args.lora_rank if bridge == "lora" else 0,
        changed=args.changed,
        learner_gpu=0 if num_gpus else None,
        engine_gpu=(1 if bridge in ON_TWO_GPUS else 0) if num_gpus else None,
        gpu_memory_utilization=args.gpu_memory_utilization,
    )
