"""`syncline serve FILE`: the inference engines alone, each a process of its own; or with `--port` one, in this process.

Engines of a group run until somebody stops them. A learner that is started apart (`syncline train FILE`, or `syncline
run FILE --engines-apart` with everything else of a run) finds them by `engine.port`.
"""

import argparse
import sys
from pathlib import Path

from syncline.cli.files import add_file, file_of
from syncline.config import RunConfig, load
from syncline.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_file(parser)
    parser.add_argument("--port", type=int, help="one engine, in this process; fails at once when the port is taken")
    parser.add_argument("--run-dir", type=Path, help="where engine.json and logs are written; default: run.dir-servers")
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
    config = load(*file_of(args))
    if args.bridge_config and (config.bridge.name != "shared" or args.attach_to):
        fault = f"bridge.name: {config.bridge.name!r}" if config.bridge.name != "shared" else "--attach-to"
        raise ConfigError([f"{fault} has no weights of its own for --bridge-config to tell of; use shared, without it"])
    if args.port is None:
        alone = ("checkpoint", "attach_to", "bridge_config")
        if given := [option for option in alone if getattr(args, option)]:
            raise ConfigError([f"--{given[0].replace('_', '-')}: is for one engine; give it a --port"])
        return _serve_all(config, args.run_dir or Path(f"{config.run.dir}-servers"))
    return _serve_one(config, args)


def _serve_one(config: RunConfig, args: argparse.Namespace) -> int:
    from syncline.engines.vllm.arguments import Start
    from syncline.engines.vllm.server import serve
    from syncline.launch.plan import see_only
    from syncline.launch.ports import refuse_taken

    see_only("engine.devices", config.engine.devices, device=config.engine.device)
    refuse_taken("--port", config.engine.host, args.port)
    start = Start(
        args.port,
        checkpoint=args.checkpoint,
        policy_version=args.policy_version,
        attach_to=args.attach_to,
        bridge_config=args.bridge_config,
    )
    return serve(config, start, run_dir=args.run_dir, argv=sys.argv[1:])


def _serve_all(config: RunConfig, folder: Path) -> int:
    """0 never: a group of engines ends by a signal (128 + its number), or as one that died."""
    from syncline.launch.plan import Machine, plan_servers, wanted_engine_ports
    from syncline.launch.ports import lease_ports
    from syncline.launch.run_folder import servers_folder
    from syncline.launch.supervisor import Interrupted, Supervisor

    wanted = wanted_engine_ports(config)
    if not wanted:
        raise ConfigError(["engine.servers: every one has a url and runs already; there is none to start"])
    with lease_ports(wanted) as ports, servers_folder(config, folder) as path:
        specs = plan_servers(config, ports=ports, machine=Machine.here(), folder=path)
        for spec in specs:
            print(f"{spec.name}: http://{config.engine.host}:{spec.ports[0]}, log {spec.log}", flush=True)
        try:
            with Supervisor(specs, folder=path) as supervisor:
                supervisor.run()
        except Interrupted as stopped:
            print(f"syncline serve: {stopped}", file=sys.stderr)
            return stopped.exit_code
    return 0
