"""`syncline bench sync`: what a publish costs over each bridge, beside the link and TRL, in one run.

The engines of all shapes start at once; a process of its own measures on them, one after another, and tells this one
what it knows. So whatever fails, hangs or takes too long costs its own row, and the table of what is known comes by the
deadline, and when the run is interrupted.
"""

import argparse
import json
import signal
import sys
import tempfile
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING

from syncline.errors import ConfigError, EngineGone

if TYPE_CHECKING:
    from syncline.bench.apart import Outcome
    from syncline.bench.plan import Plan
    from syncline.bench.sync import Case

BRIDGES = ("shared", "broadcast", "lora", "restart")
ON_TWO_GPUS = ("broadcast",)
START_SHARE = 0.6
"""Of the time that is left: what has not started by then is left out."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=("sync",))
    source = parser.add_mutually_exclusive_group(required=True)
    shapes = "random weights of known shapes, such as qwen2.5-0.5b; their engines are all there at once"
    source.add_argument("--shape", action="extend", nargs="+", help=shapes)
    source.add_argument("--model", type=Path, help="a model folder")
    parser.add_argument("--bridge", action="append", choices=BRIDGES, help="default: all this machine can run")
    parser.add_argument("--publishes", type=int, default=20)
    parser.add_argument("--requests", type=int, default=64, help="that run during the publishes")
    parser.add_argument("--lora-rank", type=int, default=32, help="of the lora bridge's adapter")
    parser.add_argument("--changed", type=float, default=1.0, help="share of values a publish changes; below 1: sparse")
    parser.add_argument("--kv-cache-gib", type=float, help="of each engine, TRL's too; default: 4, on a CPU 1")
    parser.add_argument("--no-trl", action="store_true", help="leave TRL's server mode out even where it is installed")
    parser.add_argument("--deadline", type=float, default=3600.0, help="seconds until the table of what is known then")
    parser.add_argument("--seconds-each", type=float, default=240.0, help="at most, of one bridge or reference")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "syncline-bench")
    parser.add_argument("--json", type=Path, help="write every number there too")
    parser.add_argument("--take", type=json.loads, help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int:
    from syncline.bench.apart import Outcome, process_start, take, watch
    from syncline.bench.engine import together
    from syncline.bench.plan import Plan
    from syncline.bridges.ranks import ONE_RANK
    from syncline.cli.bridge import build_bridge

    if not 0 < args.changed <= 1:
        raise ConfigError([f"--changed: {args.changed:g} is no share; give one above 0 and up to 1"])
    plan = Plan(_cases(args), args.folder, with_trl=not args.no_trl and find_spec("trl") is not None)
    if args.take:
        measurements = plan.measurements(args.take, partial(build_bridge, ranks=ONE_RANK))
        take(measurements, args.take, plan.told, (EngineGone,))
        return 0
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    outcome, deadline = Outcome(), process_start() + args.deadline
    left = deadline - monotonic()
    child = [sys.executable, "-m", "syncline", *sys.argv[1:], "--take"]
    with together(plan.engines() if left > 0 else {}, plan.found, seconds=START_SHARE * left):
        try:
            bounds = {"seconds_each": args.seconds_each, "deadline": deadline}
            watch(plan.names, lambda names: [*child, json.dumps(names)], plan.told, outcome=outcome, **bounds)
        finally:  # before the engines end, which takes seconds
            _print(plan, outcome, args.json)
    return 0


def _print(plan: "Plan", outcome: "Outcome", file: Path | None) -> None:
    from pydantic import TypeAdapter

    from syncline.bench.sync import Result
    from syncline.bench.table import as_json, sync_table

    known = outcome.so_far | outcome.results
    results = [TypeAdapter(Result).validate_python(known[case.name]) for case in plan.cases if case.name in known]
    references: dict[str, dict[str, dict]] = {case.shape: {} for case in plan.cases}
    for one in plan.comparisons:
        if one.name in known:
            references[one.case.shape][one.label] = known[one.name]
    left_out = outcome.faults | dict.fromkeys(outcome.missing(plan.names), "left out")
    print("\n".join(sync_table(results, references, left_out)), flush=True)
    if file:
        file.write_text(json.dumps(as_json(results, references, left_out)))


def _cases(args: argparse.Namespace) -> "list[Case]":
    """Every bridge on every shape, shape by shape."""
    import torch

    num_gpus = torch.cuda.device_count()
    bridges = args.bridge or [name for name in BRIDGES if num_gpus != 1 or name not in ON_TWO_GPUS]
    if num_gpus == 1 and (alone := [name for name in bridges if name in ON_TWO_GPUS]):
        raise ConfigError([f"--bridge: {alone[0]!r} sends from one GPU to another, and this machine shows one"])
    args.folder.mkdir(parents=True, exist_ok=True)
    return [
        _case(args, name, shape=shape, model=model, num_gpus=num_gpus)
        for shape, model in _models(args)
        for name in bridges
    ]


def _models(args: argparse.Namespace) -> list[tuple[str, Path]]:
    """Name and folder of each model; those of known shapes are made once."""
    from syncline.bench.shapes import LAST_FILE, SHAPES, make_model
    from syncline.bench.sync import MAX_LENGTH

    if args.model:
        return [(args.model.name, args.model)]
    if unknown := [shape for shape in args.shape if shape not in SHAPES]:
        raise ConfigError([f"--shape: {name!r} is not one of {', '.join(sorted(SHAPES))}" for name in unknown])
    models = [(shape, args.folder / shape) for shape in args.shape]
    for shape, folder in models:
        if not (folder / LAST_FILE).exists():
            make_model(shape, folder, max_length=MAX_LENGTH)
    return models


def _case(args: argparse.Namespace, bridge: str, *, shape: str, model: Path, num_gpus: int) -> "Case":
    from syncline.bench.sync import Case

    gib = args.kv_cache_gib or (4 if num_gpus else 1)
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
        kv_cache_bytes=int(gib * (1 << 30)),
    )
