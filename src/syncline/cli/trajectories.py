"""`syncline trajectories FILE`: the trajectory server alone."""

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from syncline.config import RunConfig, load

if TYPE_CHECKING:
    from syncline.trajectory.atropos_wire import Registration


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", help="the run's YAML file; groups are kept in its run.dir")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c")
    parser.add_argument("--port", type=int, required=True, help="fails at once when it is taken")


def run(args: argparse.Namespace) -> int:
    from syncline.observe.logs import set_up_logging
    from syncline.trajectory.guard import TOKEN_VARIABLE
    from syncline.trajectory.serve import run_server

    set_up_logging()
    config = load(args.file, args.overrides)
    run_server(
        config.run,
        config.trajectory,
        environments={e.name or e.task: e.weight for e in config.environments},
        run_id=f"{Path(config.run.dir).resolve().name}, seed {config.run.seed}",
        port=args.port,
        token=os.environ.get(TOKEN_VARIABLE),
        own=_registration(config),
    )
    return 0


def _registration(config: RunConfig) -> "Registration":
    """What environments of the Atropos wire are told about this run."""
    from syncline.trajectory.atropos_wire import Registration

    run, folder = config.run, Path(config.run.dir)
    return Registration(
        wandb_group=folder.resolve().name,
        wandb_project="syncline",
        batch_size=run.groups_per_step * run.rollouts_per_group,
        max_token_len=config.model.max_length,
        checkpoint_dir=str(folder / "checkpoints"),
        save_checkpoint_interval=config.learner.checkpoint_interval,
        starting_step=0,
        num_steps=run.num_steps,
    )
