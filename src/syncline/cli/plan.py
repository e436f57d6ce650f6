"""`syncline plan FILE`: memory and time of a run's parts, from the model's `config.json` alone; a split of the GPUs."""

import argparse
from collections.abc import Sequence

from syncline.cli.files import add_file, file_of
from syncline.config import RunConfig, load
from syncline.config.servers import all_devices
from syncline.errors import ConfigError
from syncline.launch.estimate import GPUS, Part, kv_bytes_per_token, total
from syncline.launch.shape import Shape, read_shape
from syncline.launch.split import Split, fastest_recomputation, splits

SHOWN = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_file(parser)
    parser.add_argument("--gpu", choices=sorted(GPUS), default="h200", help="what kind of GPU (default: h200)")
    parser.add_argument("--num-gpus", type=int, help="default: as many as the file's engines and learner name")


def run(args: argparse.Namespace) -> int:
    config = load(*file_of(args))
    num_gpus = args.num_gpus
    if num_gpus is None:
        num_gpus = len({*all_devices(config), *config.learner.devices})
    if num_gpus < 1:
        raise ConfigError([f"--num-gpus: {num_gpus} must be above 0"])
    shape, lists_engines = read_shape(config.model.path), bool(config.engine.servers)
    config = config.model_copy(update={"engine": config.engine.model_copy(update={"servers": ()})})
    found = splits(config, shape, num_gpus=num_gpus, gpu=args.gpu)
    print("\n".join(_head(config, shape, num_gpus, args.gpu)))
    faster = fastest_recomputation(config, shape, num_gpus=num_gpus, gpu=args.gpu)
    if not found:
        fault = f"--num-gpus: {num_gpus} × {args.gpu} hold no split of this run"
        if faster:
            raise ConfigError([f"{fault}; with learner.recomputation.what={faster[0]} they do"])
        more = "learner.optimizer.moments=int8 or a smaller learner.token_budget may"
        raise ConfigError([f"{fault}; more or larger GPUs, model.lora, {more}"])
    print("\n".join([*_table(found), "", *_best(found[0], args.gpu)]))
    if lists_engines:
        print("  engine.servers=[]")
    if faster and faster[1].step < found[0].step:
        print(f"with learner.recomputation.what={faster[0]} a step would take {faster[1].step:.1f} s")
    return 0


def _head(config: RunConfig, shape: Shape, num_gpus: int, gpu: str) -> list[str]:
    attempts = config.run.groups_per_step * config.run.rollouts_per_group
    size, cache = shape.parameters / 1e9, kv_bytes_per_token(shape) / 1024
    return [
        f"{config.model.path}: {size:.2f}e9 parameters, {cache:.0f} KiB of KV cache a token",
        f"a step: {attempts} attempts of up to {config.model.max_length} tokens, {config.sampling.max_tokens} of them "
        f"sampled; {num_gpus} × {gpu}",
        "estimates for completions of full length; formulas below, measured constants in docs/log.md",
        "",
    ]


def _table(found: Sequence[Split]) -> list[str]:
    titles = (("engines", 16), ("learner", 9), ("bridge", 8), ("sample", 13), ("learn", 9), ("sync", 8), ("step", 9))
    head = "".join(f"{title:>{width}}" for title, width in (*titles, ("idle E / L", 13)))
    return [head, *(_row(split) for split in found[:SHOWN])]


def _row(split: Split) -> str:
    engines = f"{split.num_engines} x TP {split.tensor_parallel}"
    engines += f" x PP {split.num_stages}" if split.num_stages > 1 else ""
    idle = [100 * (1 - busy / split.step) for busy in (split.sample, split.learn)]
    return (
        f"{engines:>16}{split.learner_gpus:>9}  {split.bridge:<10}{split.sample:>7.1f} s{split.learn:>7.1f} s"
        f"{split.sync:>6.2f} s{split.step:>7.1f} s{idle[0]:>6.0f} / {idle[1]:.0f} %"
    )


def _best(split: Split, gpu: str) -> list[str]:
    memory = GPUS[gpu][0]
    lines = _parts("a learner's GPU", split.learner, memory) + _parts("an engine's GPU", split.engine.parts, memory)
    lines += [f"the engine holds {split.engine.num_sequences} sequences of full length at once", "", "as overrides:"]
    return lines + [f"  {name}={value}".replace(", ", ",") for name, value in split.overrides().items()]


def _parts(title: str, parts: Sequence[Part], memory: float) -> list[str]:
    rows = [f"  {part.name:<18}{part.num_bytes / 1e9:>8.1f} GB  {part.formula}" for part in parts if part.num_bytes]
    whole = total(parts)
    return [f"{title}:", *rows, f"  {'together':<18}{whole / 1e9:>8.1f} GB  {100 * whole / memory:.0f} % of it"]
