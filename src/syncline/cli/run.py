"""`syncline run FILE [a.b=c …]`: starts every process of a run, watches, stops, sums up."""

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import Any

from syncline.cli.bridge import known_urls
from syncline.cli.check import load_checked
from syncline.cli.files import add_file, file_of
from syncline.config import RunConfig
from syncline.config.schema import Engine
from syncline.config.server_rules import OF_A_START
from syncline.errors import ConfigError, SynclineError
from syncline.launch.plan import Machine, plan, url, wanted_ports
from syncline.launch.ports import lease_ports
from syncline.launch.run_folder import RunFolder, claim
from syncline.launch.supervisor import Interrupted, Supervisor


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_file(parser)
    parser.add_argument(
        "--engines-apart",
        action="store_true",
        help="everything but the engines, which `syncline serve FILE` has started on engine.port and the next ones",
    )
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--resume", action="store_true", help="go on from the last checkpoint in run.dir")
    existing.add_argument("--overwrite", action="store_true", help="delete the run in run.dir and start over")


def run(args: argparse.Namespace) -> int:
    """0 when the run is done; the code of the process that failed, 8 when it was killed; 130 after Ctrl-C."""
    file, overrides = file_of(args)
    config = load_checked(file, overrides)
    if args.engines_apart:
        overrides = [*overrides, *_apart(config)]
        config = load_checked(file, overrides)
    try:
        summary = supervise(config, resume=args.resume, overwrite=args.overwrite, machine=Machine.here())
    except ConfigError:
        raise
    except (SynclineError, Interrupted) as error:
        print(f"syncline run: {error}", file=sys.stderr)
        print(f"resume with: {resume_command(file, overrides)}", file=sys.stderr)
        return error.exit_code
    print(_closing(summary, Path(config.run.dir)))
    return 0


def _apart(config: RunConfig) -> list[str]:
    """What a run is told of engines that others started, as fields of its configuration."""
    started_with = ("num_replicas", "tensor_parallel_size", "devices", *OF_A_START)
    fields = {name: Engine.model_fields[name].get_default(call_default_factory=True) for name in started_with}
    values = fields | {"servers": [{"url": url} for url in known_urls(config)]}
    return [f"engine.{name}={json.dumps(value)}" for name, value in values.items()]


def supervise(config: RunConfig, *, resume: bool, overwrite: bool, machine: Machine) -> dict[str, Any]:
    """Runs every process of `config` to its end and writes the summary, which it returns, and the report."""
    with lease_ports(wanted_ports(config)) as ports:
        specs = plan(config, ports=ports, machine=machine)
        with claim(config, resume=resume, overwrite=overwrite) as folder:
            _watch(config, folder, specs, page=f"{url(config.trajectory.host, ports['trajectory.port'])}/ui")
            return _sum_up(folder.path)


def resume_command(file: str, overrides: list[str]) -> str:
    return shlex.join(["syncline", "run", file, *overrides, "--resume"])


def _watch(config: RunConfig, folder: RunFolder, specs: Any, *, page: str) -> None:
    from rich.console import Console

    from syncline.observe.progress import Progress

    with (
        Progress(folder.path, config.run.num_steps, console=Console()) as progress,
        Supervisor(
            specs, folder=folder.path, show=progress.print, refresh=progress.refresh, lock_fd=folder.lock_fd
        ) as supervisor,
    ):
        progress.print(f"the run as a web page: {page}")
        supervisor.run()


def _sum_up(path: Path) -> dict[str, Any]:
    from syncline.observe.report import write_report
    from syncline.observe.summary import write_summary

    summary = write_summary(path)
    write_report(path)
    return summary


def _closing(summary: dict[str, Any], folder: Path) -> str:
    from syncline.observe.page import number
    from syncline.observe.report import REPORT_FILE
    from syncline.observe.summary import SUMMARY_FILE

    lines = [
        f"reward            {number(summary['reward_first'])} -> {number(summary['reward_last'])}",
        f"held-out accuracy {number(summary['heldout_before'])} -> {number(summary['heldout_after'])}",
        f"{summary['steps']} steps in {number(summary['train_seconds'])} s",
        f"{folder / SUMMARY_FILE}",
        f"{folder / REPORT_FILE}",
    ]
    return "\n".join(lines)
