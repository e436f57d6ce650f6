"""`syncline trajectories FILE`: the trajectory server alone."""

import argparse
from pathlib import Path

from syncline.config import load


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", help="the run's YAML file; groups are kept in its run.dir")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c")
    parser.add_argument("--port", type=int, required=True, help="fails at once when it is taken")


def run(args: argparse.Namespace) -> int:
    from syncline.observe.logs import set_up_logging
    from syncline.trajectory.serve import run_server

    set_up_logging()
    config = load(args.file, args.overrides)
    run_server(
        config.run,
        config.trajectory,
        environments={e.name or e.task: e.weight for e in config.environments},
        run_id=f"{Path(config.run.dir).resolve().name}, seed {config.run.seed}",
        port=args.port,
    )
    return 0
