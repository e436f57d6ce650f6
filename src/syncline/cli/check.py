"""`syncline check FILE [a.b=c …]`: the resolved configuration and the process plan, or every reason against them."""

import argparse
import shlex
from collections.abc import Mapping, Sequence

from syncline.cli.files import add_file, file_of
from syncline.config import RunConfig, load
from syncline.config.eight_bits import missing_torchao
from syncline.config.model_folder import model_faults
from syncline.envs.registry import BUILT_IN
from syncline.errors import ConfigError
from syncline.launch.plan import Machine, ProcessSpec, plan, wanted_ports
from syncline.launch.ports import lease_ports
from syncline.launch.run_folder import config_text
from syncline.observe.exports import missing_packages


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_file(parser)
    parser.add_argument("--engine", action="store_true", help="have vLLM check what it would be given (imports it)")


def run(args: argparse.Namespace) -> int:
    """Leases the ports for a moment, so that a taken one is found here; a port of 0 gets another number in the run."""
    config = load_checked(*file_of(args))
    if args.engine:
        _ask_vllm(config)
    machine = Machine.here()
    with lease_ports(wanted_ports(config)) as ports:
        specs = plan(config, ports=ports, machine=machine)
    print(config_text(config))
    print(f"# {len(specs)} processes; ports that the file leaves at 0 are leased anew by each run")
    for spec in specs:
        print("\n".join(f"# {line}" for line in told(spec)))
    return 0


def _ask_vllm(config: RunConfig) -> None:
    """Its parser, and its own configuration of an engine, which it makes without loading a model."""
    from syncline.engines.vllm.arguments import Start, engine_device, parse, refuse_unusable, set_environment

    device = engine_device(config)
    set_environment(config, device)
    refuse_unusable(config, parse(config, device, Start(config.engine.port)))


def load_checked(file: str, overrides: Sequence[str]) -> RunConfig:
    """The configuration; the names of its environments and the packages it needs are checked too, not built."""
    config = load(file, overrides)
    faults = [
        f"environments.{i}.task: {own.task!r} is not a built-in; use one of {', '.join(BUILT_IN)}, or an import path "
        "such as my_package.my_module:MyEnvironment"
        for i, own in enumerate(config.environments)
        if own.task not in BUILT_IN and ":" not in own.task
    ]
    faults += [*missing_packages(config.observe), *missing_torchao(config), *model_faults(config)]
    if faults:
        raise ConfigError(faults)
    return config


def told(spec: ProcessSpec) -> list[str]:
    """A process as lines for people."""
    facts: Mapping[str, str] = {
        "starts after": ", ".join(spec.starts_after),
        "ends with": spec.ends_with or "",
        "devices": ", ".join(f"cuda:{name}" for name in spec.devices) or "cpu",
        "ports": ", ".join(str(port) for port in spec.ports),
        "env": " ".join(f"{name}={shlex.quote(value)}" for name, value in spec.env.items()),
        "log": str(spec.log),
    }
    lines = [f"  {name}: {fact}" for name, fact in facts.items() if fact]
    return ["", f"{spec.name} ({spec.kind})", f"  {shlex.join(spec.argv)}", *lines]
