"""`syncline bench sync`: what a publish costs over each bridge, beside the link and TRL, in one run.

The engines of all shapes and tensor parallel sizes start at once; a process of its own measures on them, one after
another, and tells this one what it knows; over `shared` it starts as many ranks as the engine has, which measure. So
whatever fails, hangs or takes too long costs its own row, and the table of what is known comes by the deadline, and
when the run is interrupted; the exit code is 1 where a row is not whole.
"""

import argparse
import json
import os
import signal
import sys
import tempfile
from collections.abc import Iterable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING

from syncline.cli.ranks import is_rank, run_ranks
from syncline.errors import ConfigError, EngineGone

if TYPE_CHECKING:
    from syncline.bench.apart import Outcome
    from syncline.bench.case import Case
    from syncline.bench.plan import Plan

BRIDGES = ("shared", "broadcast", "lora", "restart")
APART = ("broadcast",)
"""Whose learner has a GPU that none of the engine's ranks is on."""
START_SHARE = 0.6
"""Of the time that is left: what has not started by then is left out."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=("sync",))
    source = parser.add_mutually_exclusive_group(required=True)
    shapes = "random weights of known shapes, such as qwen2.5-0.5b; their engines are all there at once"
    source.add_argument("--shape", action="extend", nargs="+", help=shapes)
    source.add_argument("--model", type=Path, help="a model folder")
    parser.add_argument("--bridge", action="append", choices=BRIDGES, help="default: all this machine can run")
    ranks = "of each engine, and of the learner over shared; default: 1"
    parser.add_argument("--tensor-parallel", type=int, nargs="+", default=[1], metavar="RANKS", help=ranks)
    parser.add_argument("--publishes", type=int, default=20)
    parser.add_argument("--requests", type=int, default=64, help="that run during the publishes")
    parser.add_argument("--lora-rank", type=int, default=32, help="of the lora bridge's adapter")
    parser.add_argument("--changed", type=float, default=1.0, help="share of values a publish changes; below 1: sparse")
    parser.add_argument("--kv-cache-gib", type=float, help="of each engine's rank, TRL's too; default: 4, on a CPU 1")
    parser.add_argument("--no-trl", action="store_true", help="leave TRL's server mode out even where it is installed")
    parser.add_argument("--deadline", type=float, default=3600.0, help="seconds until the table of what is known then")
    parser.add_argument("--seconds-each", type=float, default=240.0, help="at most, of one bridge or reference")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "syncline-bench")
    parser.add_argument("--json", type=Path, help="write every number there too")
    parser.add_argument("--take", type=json.loads, help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int:
    from syncline.bench.apart import Outcome, process_start, watch
    from syncline.bench.engine import together
    from syncline.bench.plan import Plan

    if not 0 < args.changed <= 1:
        raise ConfigError([f"--changed: {args.changed:g} is no share; give one above 0 and up to 1"])
    plan = Plan(_cases(args), args.folder, with_trl=not args.no_trl and find_spec("trl") is not None)
    if args.take:
        return _take(plan, args.take)
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
    return 0 if not outcome.missing(plan.names) and not outcome.faults else 1


def _take(plan: "Plan", names: Sequence[str]) -> int:
    """The child's part: what follows is another child's once another number of learner ranks is wanted. Where that is
    above one, this process starts them."""
    import torch

    from syncline.bench.apart import take
    from syncline.bench.engine import START_SECONDS
    from syncline.cli.bridge import build_bridge
    from syncline.learner.distributed import joined_ranks, rank_device

    number, names = plan.leading(names)
    if number > 1 and not is_rank():
        return run_ranks(number, sys.argv[1:])
    device = rank_device(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    with joined_ranks(device, timeout_seconds=START_SECONDS) as ranks:
        measurements = plan.measurements(names, partial(build_bridge, ranks=ranks), ranks=ranks)
        take(measurements, names, plan.told if ranks.is_first else Path(os.devnull), (EngineGone,))
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
    """Every bridge on every shape, at every tensor parallel size in turn. Raises `ConfigError` for what cannot be."""
    import torch

    num_gpus = torch.cuda.device_count()
    sizes = dict.fromkeys(args.tensor_parallel)
    rows = [(size, bridge) for size in sizes for bridge in _bridges(args.bridge, size, num_gpus=num_gpus)]
    args.folder.mkdir(parents=True, exist_ok=True)
    models = _models(args)
    if faults := [fault for _, folder in models for fault in _uneven(folder, sizes)]:
        raise ConfigError(faults)
    return [
        _case(args, bridge, size, shape=shape, model=model, num_gpus=num_gpus)
        for shape, model in models
        for size, bridge in rows
    ]


def _bridges(asked: Sequence[str] | None, size: int, *, num_gpus: int) -> list[str]:
    """Those that are asked for; else what this machine can run. Raises `ConfigError` for GPUs that it lacks."""
    if size < 1:
        raise ConfigError([f"--tensor-parallel: {size} is no number of ranks; give one above 0"])
    needed = {name: size + (name in APART) for name in asked or BRIDGES}
    fitting = [name for name in needed if num_gpus == 0 or needed[name] <= num_gpus]
    if fitting == list(needed) or (fitting and not asked):
        return fitting
    lacking = next(name for name in needed if name not in fitting)
    fault = f"--tensor-parallel: {size} over {lacking!r} takes {needed[lacking]} GPUs"
    if lacking in APART:
        fault += ", the learner having its own"
    if size == 1:
        fault = f"--bridge: {lacking!r} sends from one GPU to another"
    raise ConfigError([f"{fault}, and this machine shows {num_gpus}"])


def _uneven(model: Path, sizes: Iterable[int]) -> list[str]:
    """Which sizes do not divide its attention heads, as vLLM has to."""
    from syncline.config.model_folder import known_settings

    heads = known_settings(str(model)).get("num_attention_heads", 0)
    fault = f"does not divide the {heads} attention heads of {model}; give one that does"
    return [f"--tensor-parallel: {size} {fault}" for size in sizes if heads % size]


def _models(args: argparse.Namespace) -> list[tuple[str, Path]]:
    """Name and folder of each model; those of known shapes are made once."""
    from syncline.bench.case import MAX_LENGTH
    from syncline.bench.shapes import LAST_FILE, SHAPES, make_model

    if args.model:
        return [(args.model.name, args.model)]
    if unknown := [shape for shape in args.shape if shape not in SHAPES]:
        raise ConfigError([f"--shape: {name!r} is not one of {', '.join(sorted(SHAPES))}" for name in unknown])
    models = [(shape, args.folder / shape) for shape in args.shape]
    for shape, folder in models:
        if not (folder / LAST_FILE).exists():
            make_model(shape, folder, max_length=MAX_LENGTH)
    return models


def _case(
    args: argparse.Namespace, bridge: str, tensor_parallel: int, *, shape: str, model: Path, num_gpus: int
) -> "Case":
    from syncline.bench.case import Case

    gib, first = args.kv_cache_gib or (4 if num_gpus else 1), int(bridge in APART)
    return Case(
        bridge=bridge,
        model=model,
        shape=shape,
        folder=args.folder,
        publishes=args.publishes,
        num_requests=args.requests,
        lora_rank=args.lora_rank if bridge == "lora" else 0,
        changed=args.changed,
        tensor_parallel=tensor_parallel,
        engine_gpus=tuple(range(first, first + tensor_parallel)) if num_gpus else (),
        kv_cache_bytes=int(gib * (1 << 30)),
    )
