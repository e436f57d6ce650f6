"""`syncline serve FILE`: the inference engine alone."""

import argparse
import sys
from pathlib import Path

from syncline.config import load
from syncline.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", help="the run's YAML file")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c")
    parser.add_argument("--port", type=int, required=True, help="fails at once when it is taken")
    parser.add_argument("--run-dir", type=Path, help="where engine.json is written")
    parser.add_argument("--checkpoint", help="weights to start from in place of the model's own")
    parser.add_argument("--policy-version", type=int, default=-1, help="what --checkpoint is; starts paused when given")
    parser.add_argument("--attach-to", metavar="URL", help="use the weights of this engine (bridge.name = shared)")
    parser.add_argument(
        "--bridge-config",
        metavar="PATH",
        help="write vllm_bridge_config.json, for a learner that is started apart: a file, a folder, or auto "
        "($LOGDIR, or here)",
    )


def run(args: argparse.Namespace) -> int:
    from syncline.engines.vllm.arguments import Start
    from syncline.engines.vllm.server import serve

    config = load(args.file, args.overrides)
    if args.bridge_config and (config.bridge.name != "shared" or args.attach_to):
        fault = f"bridge.name: {config.bridge.name!r}" if config.bridge.name != "shared" else "--attach-to"
        raise ConfigError([f"{fault} has no weights of its own for --bridge-config to tell of; use shared, without it"])
    start = Start(
        args.port,
        checkpoint=args.checkpoint,
        policy_version=args.policy_version,
        attach_to=args.attach_to,
        bridge_config=args.bridge_config,
    )
    return serve(config, start, run_dir=args.run_dir, argv=sys.argv[1:])
