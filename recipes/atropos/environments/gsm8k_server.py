"""Atropos' GSM8K environment over this library's own: `serve`, `process` and `evaluate`, with the options it documents.

    python environments/gsm8k_server.py serve --openai.base_url http://localhost:9001/v1 --openai.model_name MODEL ...

It asks the trajectory server for permits, so tokens carry their policy versions and nothing is sampled that nobody
will train on. Atropos' own file, with all of its options, runs against the same servers unchanged.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from syncline.cli import main as syncline
from syncline.config import resolve
from syncline.errors import ConfigError

PATIENCE_SECONDS = 24 * 3600
"""For a trainer, and the server it brings: whoever starts this one first waits for them."""
_SERVER_DOES = "the trajectory server decides that, for all environments at once; leave it out"
REFUSED = {
    "env.use_wandb": (False, "rewards are in the trainer's metrics.jsonl; give False"),
    "slurm": (False, "start one engine a host and name it by --openai.base_url; give False"),
    "testing": (False, "`process` samples without a trainer; give False"),
    "env.batch_size": (-1, "it is the trainer's: --batch-size and --gradient-accumulation-steps of grpo.py"),
    "env.max_batches_offpolicy": (None, "it is the trainer's: --max-staleness of grpo.py"),
    "env.inference_weight": (1.0, _SERVER_DOES),
    "env.min_batch_allocation": (None, _SERVER_DOES),
    "env.steps_per_eval": (0, "call `evaluate`, which names the weights it measured; leave it out"),
    "config": (None, "give the options themselves"),
}
"""Option → the value that asks for nothing, and what to do instead."""
OPTIONS = {
    "run.rollouts_per_group": "--env.group_size",
    "model.max_length": "--env.max_token_length",
    "sampling.max_tokens": "--env.max_token_length - 1",
    "environments.0.concurrency": "--env.max_num_workers",
    "evaluation.num_tasks": "--num-tasks",
}
"""Field of the configuration → what sets it here, for messages."""


def truth(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")
    return text.lower() == "true"


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="gsm8k_server.py", description="GSM8K, as Atropos' environment is called.")
    p.add_argument("verb", choices=("serve", "process", "evaluate"))
    p.add_argument("--openai.model_name", required=True)
    p.add_argument("--openai.base_url", default="http://localhost:9001/v1")
    p.add_argument("--openai.server_type", default="vllm", help="any: the engine answers each in its own form")
    p.add_argument("--openai.api_key", default="x", help="is not sent: the engine is this machine's alone")
    p.add_argument("--env.tokenizer_name", help="default: the model's")
    p.add_argument("--env.rollout_server_url", default="http://localhost:8000")
    p.add_argument("--env.group_size", type=int, default=8)
    p.add_argument("--env.max_token_length", type=int, default=2048, help="prompt and completion together")
    p.add_argument("--env.max_num_workers", type=int, default=64, help="groups in flight")
    p.add_argument("--env.wandb_name", default="gsm8k", help="the environment's name")
    p.add_argument("--env.total_steps", type=int, default=8, help="process: groups")
    p.add_argument("--env.data_path_to_save_groups", default="data/gsm8k.jsonl", help="process: the file")
    p.add_argument("--env.data_dir_to_save_evals", default="evals", help="evaluate: the folder of metrics.json")
    p.add_argument("--num-tasks", type=int, default=1319, help="evaluate: questions")
    kinds: dict[type, Callable[[str], Any]] = {bool: truth, int: int, float: float}
    for name, (nothing, remedy) in REFUSED.items():
        p.add_argument(f"--{name}", type=kinds.get(type(nothing), str), default=nothing, help=f"refused: {remedy}")
    return p


def run_values(options: dict[str, Any]) -> dict[str, Any]:
    """The environment's part of a configuration as plain values. Raises `ConfigError` naming options."""
    faults = [
        f"--{name} {options[name]}: {remedy}" for name, (value, remedy) in REFUSED.items() if options[name] != value
    ]
    for name in ("openai.base_url", "env.rollout_server_url"):
        if not is_http(options[name]):
            faults.append(f"--{name} {options[name]}: is no http://host:port")
    if options["verb"] == "process" and options["env.total_steps"] < 1:
        faults.append(f"--env.total_steps {options['env.total_steps']}: makes no group; give 1 or more")
    if faults:
        raise ConfigError(faults)
    length = options["env.max_token_length"]
    return {
        "run": {"dir": ".", "num_steps": 1, "groups_per_step": 1, "rollouts_per_group": options["env.group_size"]},
        "model": {
            "path": options["openai.model_name"],
            "tokenizer": options["env.tokenizer_name"],
            "max_length": length,
        },
        "sampling": {"max_tokens": length - 1},
        "environments": [
            {"task": "gsm8k", "name": options["env.wandb_name"], "concurrency": options["env.max_num_workers"]}
        ],
        "learner": {"token_budget": length},
        "evaluation": {"num_tasks": options["num_tasks"], "temperature": 0.6},
    }


def is_http(address: str) -> bool:
    try:
        parts = urlsplit(address)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # of a port that is no number
        return False


def command(options: dict[str, Any], file: str) -> list[str]:
    """The verb of `syncline` that does it."""
    engine = ["--engine-url", options["openai.base_url"].rstrip("/").removesuffix("/v1")]
    if options["verb"] == "serve":
        trajectories = options["env.rollout_server_url"]
        return ["env", file, *engine, "--trajectories-url", trajectories, "--patience-seconds", str(PATIENCE_SECONDS)]
    if options["verb"] == "process":
        groups = ["--num-groups", str(options["env.total_steps"]), "--out", options["env.data_path_to_save_groups"]]
        return ["process", file, *engine, *groups]
    return ["evaluate", file, *engine, "--out", str(Path(options["env.data_dir_to_save_evals"]) / "metrics.json")]


def main(argv: Sequence[str] | None = None) -> int:
    options = vars(parser().parse_args(argv))
    try:
        values = run_values(options)
        resolve(values)
    except ConfigError as error:
        print(f"gsm8k_server.py: {error.renamed(OPTIONS)}", file=sys.stderr)
        return error.exit_code
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "gsm8k.yaml"
        file.write_text(yaml.safe_dump(values))
        return syncline(command(options, str(file)))


if __name__ == "__main__":
    sys.exit(main())
