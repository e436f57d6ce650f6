"""The vLLM server of Atropos' example trainer over this library: its options, environment variables and log lines.

    VLLM_ENABLE_SHARED_WEIGHTS=1 LOGDIR=. python example_trainer/vllm_api_server.py --model MODEL --port 9001

With VLLM_ENABLE_SHARED_WEIGHTS=1, or NUM_INFERENCE_NODES at 0 or above, its weights can be trained in place, and
$LOGDIR/vllm_bridge_config.json tells a learner where they lie. Options it does not know are vLLM's own.
"""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from syncline.config import RunConfig, resolve
from syncline.config.rules import ENGINE_LORA_RANKS
from syncline.errors import ConfigError, SynclineError
from syncline.launch.run_folder import config_text
from syncline.observe.files import write_atomically

CONFIG_NAME = "vllm_api_server.yaml"
_LOCAL = "the server listens on this machine alone, without TLS; put a proxy in front of it"
REFUSED = {
    **dict.fromkeys(("ssl_keyfile", "ssl_certfile", "ssl_ca_certs", "ssl_cert_reqs", "enable_ssl_refresh"), _LOCAL),
    "root_path": _LOCAL,
    "data_parallel_size": "start one server a replica, or use `syncline run` with engine.num_replicas",
}
"""Option of vLLM's or the original's → what to do instead."""
OPTIONS = {
    "model.path": "--model",
    "model.max_length": "--max-model-len",
    "engine.host": "--host",
    "engine.max_num_seqs": "--max-num-seqs",
    "engine.gpu_memory_utilization": "--gpu-memory-utilization",
    "engine.tensor_parallel_size": "--tensor-parallel-size",
}
"""Field of the configuration → what sets it here, for messages. `engine.extra.a_b` is vLLM's --a-b."""


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="vllm_api_server.py", description=__doc__.splitlines()[0] if __doc__ else None)
    p.add_argument("--model", required=True)
    p.add_argument("--host", default="127.0.0.1")
    p.add_argument("--port", type=int, default=9001)
    p.add_argument("--log-level", choices=("debug", "info", "warning", "error"), help="of vLLM's own lines")
    p.add_argument("--tokenizer")
    p.add_argument("--dtype", choices=("bfloat16", "float32", "float16", "auto"), default="bfloat16")
    p.add_argument("--tensor-parallel-size", type=int, default=1)
    p.add_argument("--gpu-memory-utilization", type=float, help="default: 0.9; 0.45 where a learner shares the GPU")
    p.add_argument("--max-model-len", type=int, help="default: the model's own, as much as fits")
    p.add_argument("--max-num-seqs", type=int)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--enforce-eager", action="store_true")
    p.add_argument("--enable-lora", action="store_true")
    p.add_argument("--max-lora-rank", type=int, choices=ENGINE_LORA_RANKS, default=16)
    return p


COUNTED = ("pipeline_parallel_size", "max_loras")
"""Options of vLLM's that the configuration counts with."""


def run_values(args: argparse.Namespace, extra: Mapping[str, Any], *, shares: bool) -> dict[str, Any]:
    """The engine's configuration as plain values. Raises `ConfigError` naming options."""
    faults = [f"--{name.replace('_', '-')} {extra[name]}: {REFUSED[name]}" for name in extra if name in REFUSED]
    if not 0 < args.port < 1 << 16:
        faults.append(f"--port {args.port}: is no port; give 1 to 65535")
    if args.dtype == "float16":
        faults.append("--dtype float16: the learner trains bfloat16 or float32 weights; use bfloat16")
    if faults:
        raise ConfigError(faults)
    ranks = args.tensor_parallel_size
    counted = {name: _number(f"--{name.replace('_', '-')}", extra[name]) for name in COUNTED if name in extra}
    stages = counted.get("pipeline_parallel_size", 1)
    on = {"tensor_parallel_size": ranks, "devices": list(range(ranks * stages))}
    used = args.gpu_memory_utilization or (0.45 if shares else 0.9)
    engine = {"host": args.host, **on, "gpu_memory_utilization": used}
    if args.enforce_eager:
        engine["enforce_eager"] = True
    if args.max_num_seqs:
        engine["max_num_seqs"] = args.max_num_seqs
    model: dict[str, Any] = {"path": args.model, "tokenizer": args.tokenizer, "dtype": args.dtype}
    if args.max_model_len:
        model["max_length"] = args.max_model_len
    context = {} if args.max_model_len else {"max_model_len": -1}
    if args.enable_lora:
        model["lora"] = {"rank": args.max_lora_rank}
    return {
        "run": {"dir": ".", "num_steps": 1, "groups_per_step": 1, "seed": args.seed},
        "model": model,
        "sampling": {"max_tokens": 1},
        "environments": [],
        "engine": engine | {"extra": context | dict(extra) | counted},
        "learner": {"token_budget": model.get("max_length", 8192), **(on if shares and not args.enable_lora else {})},
        "bridge": {"name": "shared" if shares else "lora" if args.enable_lora else "restart"},
    }


def passed_through(words: Sequence[str]) -> dict[str, Any]:
    """vLLM's own options, which it checks itself: `--a-b 1 --c --no-d` → {"a_b": "1", "c": True, "d": False}."""
    found: dict[str, Any] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or not name:
            raise ConfigError([f"{word}: is no option"])
        if equals or (rest and not rest[0].startswith("--")):
            found[name.replace("-", "_")] = value if equals else rest.pop(0)
        else:
            found[name.removeprefix("no-").replace("-", "_")] = not name.startswith("no-")
    return found


def shares_weights(environment: Mapping[str, str]) -> bool:
    asked = environment.get("VLLM_ENABLE_SHARED_WEIGHTS") == "1"
    return asked or _number("NUM_INFERENCE_NODES", environment.get("NUM_INFERENCE_NODES", "-1")) >= 0


def _number(name: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ConfigError([f"{name}: {text!r} is not a whole number"]) from None


def promised(line: str) -> None:
    """The library's lines as the example trainer's documents show them."""
    if line.startswith("Exported"):
        line = "[vLLM Patch] " + ("✓ " if "params to" in line else "") + line
    print(line, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    args, rest = parser().parse_known_args(argv)
    try:
        shares = shares_weights(os.environ)
        return _serve(resolve(run_values(args, passed_through(rest), shares=shares)), args, shares=shares)
    except SynclineError as error:
        told = error.renamed(OPTIONS) if isinstance(error, ConfigError) else error
        print(f"vllm_api_server.py: {told}", file=sys.stderr)
        return error.exit_code


def _serve(config: RunConfig, args: argparse.Namespace, *, shares: bool) -> int:
    from syncline.engines.vllm.arguments import Start
    from syncline.engines.vllm.server import serve

    if args.log_level:
        os.environ["VLLM_LOGGING_LEVEL"] = args.log_level.upper()
    file = write_atomically(Path(os.environ.get("LOGDIR", ".")) / CONFIG_NAME, config_text(config))
    bridge_config = os.environ.get("VLLM_BRIDGE_CONFIG_PATH", "auto") if shares else None
    options = ["--bridge-config", bridge_config] if bridge_config else []
    command = ["serve", str(file), "--port", str(args.port), *options]
    return serve(config, Start(args.port, bridge_config=bridge_config), run_dir=None, argv=command, say=promised)


if __name__ == "__main__":
    sys.exit(main())
