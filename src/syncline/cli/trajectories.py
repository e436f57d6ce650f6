"""`syncline trajectories FILE`: the trajectory server alone. Without a file it is every run's that a learner or a
trainer of the Atropos wire begins on it, as Atropos' own server is."""

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from syncline.config import RunConfig, load
from syncline.config.rules import LOOPBACK
from syncline.config.schema import Trajectory
from syncline.errors import ConfigError

if TYPE_CHECKING:
    from syncline.trajectory.atropos_wire import Registration
    from syncline.trajectory.wire import RunTerms


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "file", nargs="?", help="the run's YAML file; groups are kept in its run.dir. Without: any run's"
    )
    parser.add_argument("overrides", nargs="*", metavar="a.b=c")
    parser.add_argument("--port", type=int, required=True, help="fails at once when it is taken")
    parser.add_argument("--host", help="without a file; 127.0.0.1, or another and a token")
    parser.add_argument("--folder", type=Path, help="without a file: where the runs' groups are kept")


def run(args: argparse.Namespace) -> int:
    from syncline.observe.logs import set_up_logging
    from syncline.trajectory.guard import TOKEN_VARIABLE
    from syncline.trajectory.serve import run_server, run_tenants

    set_up_logging()
    token = os.environ.get(TOKEN_VARIABLE)
    if bool(args.file) == bool(args.folder):
        raise ConfigError(["FILE, --folder: give one of the two: the run's file, or the folder of any run's groups"])
    if args.folder:
        run_tenants(args.folder, Trajectory(host=args.host or LOOPBACK[0]), port=args.port, token=token)
        return 0
    config = load(args.file, args.overrides)
    run_server(
        config.run,
        config.trajectory,
        environments={e.name or e.task: e.weight for e in config.environments},
        run_id=run_id(config),
        port=args.port,
        token=token,
        own=registration(config),
    )
    return 0


def run_id(config: RunConfig) -> str:
    return f"{Path(config.run.dir).resolve().name}, seed {config.run.seed}"


def run_terms(config: RunConfig) -> "RunTerms":
    """What a server without a file is told of the run."""
    from syncline.trajectory.wire import RunTerms

    run = config.run
    return RunTerms(
        run_id=f"{Path(run.dir).resolve()}, seed {run.seed}",
        groups_per_step=run.groups_per_step,
        rollouts_per_group=run.rollouts_per_group,
        max_staleness=run.max_staleness,
        max_refills=run.max_refills,
        registration=registration(config),
    )


def registration(config: RunConfig) -> "Registration":
    """What environments of the Atropos wire are told about this run."""
    from syncline.trajectory.atropos_wire import Registration

    run, folder = config.run, Path(config.run.dir)
    return Registration(
        wandb_group=folder.resolve().name,
        wandb_project="syncline",
        batch_size=run.groups_per_step * run.rollouts_per_group,
        max_token_len=config.model.max_length,
        checkpoint_dir=str((folder / config.learner.checkpoint_name).parent),
        save_checkpoint_interval=config.learner.checkpoint_interval,
        starting_step=0,
        num_steps=run.num_steps,
    )
