"""Atropos' example trainer over this library: its flags, files and log lines.

    python example_trainer/grpo.py --model-name MODEL --weight-bridge-mode shared_vllm --training-steps 100

Starts what is not there yet, the trajectory server at --atropos-url and in the modes `none` and `lora_restart` vLLM,
and the learner (`learner.py`); watches them, and stops what it started. Called again with the same --save-path it goes
on from the last checkpoint there.
"""

import argparse
import json
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from trainer_flags import FLAGS, OWN_ENGINE, address, parser, run_values

from syncline.config import RunConfig, resolve
from syncline.config.rules import LOOPBACK
from syncline.errors import ConfigError, SynclineError
from syncline.launch.plan import Machine, ProcessSpec, plan, url, wanted_ports
from syncline.launch.ports import lease_ports
from syncline.launch.run_folder import LOCK_FILE, claim, config_text
from syncline.launch.supervisor import Interrupted, Supervisor
from syncline.observe.files import CONFIG_FILE, read_lines
from syncline.observe.sinks import METRICS_FILE

LEARNER = Path(__file__).with_name("learner.py")


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        config = resolve(run_values(args))
        _train(config, args)
    except (SynclineError, Interrupted) as error:
        told = error.renamed(FLAGS) if isinstance(error, ConfigError) else error
        print(f"grpo.py: {told}", file=sys.stderr)
        return error.exit_code
    _name_the_last(config)
    if args.benchmark:
        print("\n".join(benchmark(config, args.weight_bridge_mode)))
    return 0


def _train(config: RunConfig, args: argparse.Namespace) -> None:
    folder = Path(config.run.dir)
    serves = not is_served(*address(args.atropos_url))
    started = processes(config, args, Machine.here(), serves=serves)
    ports = {port for spec in started for port in spec.ports}
    wanted = {field: address for field, address in wanted_ports(config).items() if address[1] in ports}
    resume = goes_on(config)
    with lease_ports(wanted), claim(config, resume=resume, overwrite=(folder / CONFIG_FILE).exists()) as claimed:
        print(f"[Trainer] Atropos API: {args.atropos_url}, {'served by this trainer' if serves else 'already there'}")
        with Supervisor(started, folder=folder, show=show, lock_fd=claimed.lock_fd) as supervisor:
            supervisor.run()


def goes_on(config: RunConfig) -> bool:
    """Whether --save-path has a run to go on with. One that trained no step is begun anew when its flags change."""
    folder = Path(config.run.dir)
    if not (folder / LOCK_FILE).exists() or not (folder / CONFIG_FILE).exists():
        return False
    same = (folder / CONFIG_FILE).read_text() == config_text(config)
    return same or bool(read_lines(folder / METRICS_FILE))


def processes(
    config: RunConfig, args: argparse.Namespace, machine: Machine, *, serves: bool
) -> tuple[ProcessSpec, ...]:
    """What this trainer starts: the learner, and of the servers those that are not there."""
    ports = {"trajectory.port": config.trajectory.port, "engine.port": config.engine.port}
    there = {"trajectories": not serves, "engine": args.weight_bridge_mode not in OWN_ENGINE}
    specs = plan(config, ports=ports, machine=machine)
    return tuple(_placed(spec, args) for spec in specs if not there.get(spec.name))


def _placed(spec: ProcessSpec, args: argparse.Namespace) -> ProcessSpec:
    """As this trainer starts it: its own learner, and logs where they were asked for."""
    log = Path(args.log_dir) / spec.log.name if args.log_dir else spec.log
    if spec.name != "learner":
        return replace(spec, log=log)
    engine = ["--engine-url", url(LOOPBACK[0], args.vllm_port)]
    if args.weight_bridge_mode == "shared_vllm":
        engine = ["--bridge-config", args.vllm_config_path or "auto"]
    options = [*engine, "--trajectories-url", url(*address(args.atropos_url))]
    if args.debug_loading:
        options.append("--debug-loading")
    argv = (spec.argv[0], str(LEARNER), spec.argv[4], *options)
    return replace(spec, argv=argv, log=log, starts_after=())


def is_served(host: str, port: int) -> bool:
    """Whether a trajectory server of ours answers there. Raises `ConfigError` where another one does."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"{url(host, port)}/health", timeout=10) as answer:
            ours = "wire_version" in json.load(answer)
    except (urllib.error.HTTPError, ValueError):
        ours = False
    except OSError as error:
        if host in LOOPBACK:
            return False
        raise ConfigError([f"--atropos-url: nobody answers on {host}:{port} ({error}); start run-api there"]) from error
    if not ours:
        raise ConfigError(
            [
                f"--atropos-url: what answers on {host}:{port} is not syncline's trajectory server (Atropos' own keeps "
                "nothing that it accepts); stop it and start recipes/atropos/run-api, or leave it to this trainer"
            ]
        )
    return True


def show(line: str) -> None:
    """The learner's lines as it wrote them, the others under their names."""
    name, _, text = line.partition(" | ")
    print(text if name.strip() == "learner" else line, flush=True)


def _name_the_last(config: RunConfig) -> None:
    """`final_model`, or `final_adapter`: the last checkpoint under a name that does not change."""
    folder = Path(config.run.dir)
    final = folder / ("final_adapter" if config.model.lora else "final_model")
    beside = final.with_name(f".{final.name}")
    beside.unlink(missing_ok=True)
    beside.symlink_to(config.learner.checkpoint_name.format(step=config.run.num_steps))
    os.replace(beside, final)
    print(f"Final checkpoint: {final}")


def benchmark(config: RunConfig, mode: str) -> list[str]:
    steps = read_lines(Path(config.run.dir) / METRICS_FILE)
    told = [f"BENCHMARK SUMMARY ({mode})", f"  Steps: {len(steps)}"]
    for title, key in (
        ("step", "time/step_seconds"),
        ("sync", "time/sync_seconds"),
        ("data fetch", "time/wait_seconds"),
    ):
        seconds = [step[key] for step in steps if step.get(key) is not None]
        told.append(
            f"  {title.capitalize()} time: {sum(seconds):.1f} s, {sum(seconds) / max(1, len(seconds)):.3f} s a step"
        )
    peaks = [peak for step in steps if (peak := step.get("memory/microbatch_peak_bytes"))]
    return [*told, f"  Peak GPU memory: {max(peaks) / 1e9:.2f} GB"] if peaks else told


if __name__ == "__main__":
    sys.exit(main())
