"""The flags of Atropos' example trainer → our configuration: each does what it says, or is refused with the reason.

Pure, so that every flag is tested without a process. What the original parsed and never read, or ignored in some modes,
is refused where it would still do nothing.
"""

import argparse
import math
from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import urlsplit

from syncline.config.rules import LOOPBACK
from syncline.errors import ConfigError

MODES = ("none", "shared_vllm", "lora_only", "lora_restart")
OWN_ENGINE = ("none", "lora_restart")
"""Modes in which the trainer starts vLLM itself."""
BRIDGES = {"none": "restart", "shared_vllm": "shared", "lora_only": "lora", "lora_restart": "restart"}
PARITY_STEPS = 20
_ADAPTER_LAYERS = "use --weight-bridge-mode lora_only with --lora-layer-indices"
_ONE_TRAINER = (
    "two trainers would draw the same queue empty and move one engine to two policies; for a learner of several GPUs "
    "use `syncline run` with learner.data_parallel_size"
)
_DISTILLED = "distillation has no loss here, nor in the last version of the original; leave it out"
ALWAYS_REFUSED: dict[str, tuple[Any, str]] = {
    "train_layer_indices": (None, f"every layer is trained; {_ADAPTER_LAYERS}"),
    "adafactor_scale_parameter": (False, "there is no adafactor here; use --optimizer adamw_8bit for little memory"),
    "adafactor_relative_step": (False, "there is no adafactor here; give --lr and --warmup-steps"),
    "max_model_len": (None, "vLLM takes the model's own context, as much as fits; --seq-len bounds what is trained"),
    "trainer_rank": (0, _ONE_TRAINER),
    "world_size": (1, _ONE_TRAINER),
    "init_method": ("env://", _ONE_TRAINER),
    "num_inference_nodes": (
        0,
        "give 0: engines on other hosts are for `syncline train` with --engine-url",
    ),
    "distill_enabled": (False, _DISTILLED),
    "distill_coef": (None, _DISTILLED),
    "distill_temperature": (None, _DISTILLED),
}
"""Flag → the one value that asks for nothing, and what to do instead."""
FLAGS = {
    "run.dir": "--save-path",
    "run.num_steps": "--training-steps",
    "run.groups_per_step": "--batch-size x --gradient-accumulation-steps / --group-size",
    "run.rollouts_per_group": "--group-size",
    "run.max_staleness": "--max-staleness",
    "model.path": "--model-name",
    "model.dtype": "--dtype",
    "model.max_length": "--seq-len",
    "model.lora": "--weight-bridge-mode, --lora-*",
    "model.lora.rank": "--lora-r",
    "model.lora.alpha": "--lora-alpha",
    "model.lora.dropout": "--lora-dropout",
    "model.lora.target_modules": "--lora-target-modules",
    "sampling.max_tokens": "--seq-len - 1",
    "engine.port": "--vllm-port",
    "engine.device": "--device",
    "engine.devices": "--vllm-gpu",
    "engine.gpu_memory_utilization": "--gpu-memory-utilization",
    "trajectory.port": "--atropos-url",
    "learner.device": "--device",
    "learner.devices": "--device",
    "learner.token_budget": "--batch-size x --seq-len",
    "learner.checkpoint_interval": "--checkpoint-interval",
    "learner.num_checkpoints": "--training-steps",
    "learner.loss.clip_low": "--clip-eps",
    "learner.loss.clip_high": "--clip-eps",
    "learner.loss.kl_coef": "--kl-coef",
    "learner.optimizer.learning_rate": "--lr",
    "learner.optimizer.num_warmup_steps": "--warmup-steps",
    "learner.optimizer.moments": "--optimizer",
    "bridge.name": "--weight-bridge-mode",
    "bridge.interval": "--vllm-restart-interval",
}
"""Field of the configuration → what sets it here, for messages."""


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="grpo.py", description="GRPO over the Atropos API, with the flags of its example trainer."
    )
    for add in (_training, _files, _engine, _adapter, _refused, _ours):
        add(p)
    return p


def _training(p: argparse.ArgumentParser) -> None:
    p.add_argument("--model-name", "--model", required=True, help="a hub name or a folder")
    p.add_argument("--lr", type=float, default=1e-5)
    p.add_argument("--training-steps", type=int, default=10, help="in all; a second call with more goes on")
    p.add_argument("--batch-size", type=int, default=2, help="sequences of --seq-len that a micro-batch has room for")
    p.add_argument("--gradient-accumulation-steps", type=int, default=32)
    p.add_argument("--seq-len", type=int, default=2048, help="longest sequence")
    p.add_argument("--warmup-steps", type=int, default=0)
    p.add_argument("--optimizer", choices=("adamw", "adamw_8bit", "adafactor"), default="adamw")
    p.add_argument("--clip-eps", type=float, default=0.2)
    p.add_argument("--kl-coef", type=float, default=0.0)
    p.add_argument("--device", default="auto", help="cuda, cuda:N, cpu")
    p.add_argument("--dtype", choices=("bfloat16", "float32", "float16", "auto"), default="bfloat16")


def _files(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--save-path", default="trained_model_checkpoints", help="checkpoints, metrics and logs; resumed from"
    )
    p.add_argument(
        "--checkpoint-interval", type=int, help="steps; 0: the last alone. Default: 3, or the engine's restarts"
    )
    p.add_argument("--log-dir", help="logs of the processes that this one starts; default: SAVE_PATH/logs")
    p.add_argument("--debug-loading", action="store_true", help="say what is loaded")
    p.add_argument("--benchmark", action="store_true", help="end with a summary of times")
    p.add_argument("--use-wandb", action="store_true", help="metrics go to wandb too, beside SAVE_PATH/metrics.jsonl")
    p.add_argument("--wandb-project")
    p.add_argument("--wandb-group", help="default: the last part of SAVE_PATH")


def _engine(p: argparse.ArgumentParser) -> None:
    p.add_argument("--atropos-url", default="http://localhost:8000", help="is served by this process if nobody does")
    p.add_argument("--weight-bridge-mode", choices=MODES, default="none")
    p.add_argument("--single-copy", action="store_true", help="what shared_vllm does anyway")
    p.add_argument("--vllm-config-path", help="vllm_bridge_config.json; default: looked for")
    p.add_argument("--vllm-port", type=int, default=9001)
    p.add_argument("--vllm-gpu", type=int, help="of those this process sees, for the engine it starts")
    p.add_argument("--gpu-memory-utilization", "--vllm-gpu-memory-utilization", type=float)
    p.add_argument("--vllm-restart-interval", type=int, default=3, help="steps between syncs; shared_vllm: every step")


def _adapter(p: argparse.ArgumentParser) -> None:
    p.add_argument("--lora-r", type=int, default=16)
    p.add_argument("--lora-alpha", type=float, default=32)
    p.add_argument("--lora-dropout", type=float, default=0.0)
    p.add_argument("--lora-target-modules", nargs="+", default=["q_proj", "v_proj"])
    p.add_argument("--lora-layer-indices", help="20-31, or 0-3,28-31; default: all")


def _refused(p: argparse.ArgumentParser) -> None:
    kinds: dict[type, Callable[[str], Any]] = {int: int, bool: bool}
    for name, (nothing, remedy) in ALWAYS_REFUSED.items():
        flag, told = f"--{name.replace('_', '-')}", f"refused: {remedy}".replace("%", "%%")
        if nothing is False:
            p.add_argument(flag, action="store_true", help=told)
        else:
            p.add_argument(flag, type=kinds.get(type(nothing), str), default=nothing, help=told)


def _ours(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--group-size", type=int, default=8, help="sequences of a group, as the environment's env.group_size"
    )
    p.add_argument("--max-staleness", type=int, default=1, help="syncs a token may be older than the policy trained")


def faults(args: argparse.Namespace) -> list[str]:
    """What was asked for and cannot be: flag, value and remedy."""
    found = [
        f"--{name.replace('_', '-')} {getattr(args, name)}: {remedy}"
        for name, (nothing, remedy) in ALWAYS_REFUSED.items()
        if getattr(args, name) != nothing
    ]
    mode = args.weight_bridge_mode
    if mode not in OWN_ENGINE:
        for name in ("vllm_gpu", "gpu_memory_utilization"):
            if getattr(args, name) is not None:
                remedy = f"with --weight-bridge-mode {mode} you start vLLM yourself; give it to vllm_api_server.py"
                found.append(f"--{name.replace('_', '-')} {getattr(args, name)}: {remedy}")
    if mode != "shared_vllm":
        for name in ("single_copy", "vllm_config_path"):
            if getattr(args, name):
                found.append(f"--{name.replace('_', '-')}: is for --weight-bridge-mode shared_vllm, not {mode}")
    if not mode.startswith("lora") and args.lora_layer_indices is not None:
        found.append(f"--lora-layer-indices {args.lora_layer_indices}: {_ADAPTER_LAYERS}")
    for name in ("wandb_project", "wandb_group"):
        if getattr(args, name) and not args.use_wandb:
            found.append(f"--{name.replace('_', '-')} {getattr(args, name)}: is for --use-wandb; give that too")
    if args.optimizer == "adafactor":
        found.append("--optimizer adafactor: is not here; use adamw_8bit, whose moments take 2 bytes a parameter")
    if args.dtype == "float16":
        found.append("--dtype float16: gradients under- and overflow without loss scaling; use bfloat16")
    sequences = args.batch_size * args.gradient_accumulation_steps
    if args.vllm_restart_interval < 1:
        found.append(f"--vllm-restart-interval {args.vllm_restart_interval}: steps between syncs; give 1 or more")
    if args.group_size < 2 or sequences < 1 or sequences % args.group_size:
        found.append(
            f"--group-size {args.group_size}: a step trains --batch-size x --gradient-accumulation-steps = {sequences} "
            "sequences, which are whole groups of 2 or more; change one of the three"
        )
    return found


def run_values(args: argparse.Namespace) -> dict[str, Any]:
    """The run's configuration as plain values. Raises `ConfigError` naming flags."""
    if found := faults(args):
        raise ConfigError(found)
    mode, max_staleness = args.weight_bridge_mode, args.max_staleness
    interval = 1 if mode == "shared_vllm" else args.vllm_restart_interval
    sequences = args.batch_size * args.gradient_accumulation_steps
    values: dict[str, Any] = {
        "run": {
            "dir": args.save_path,
            "num_steps": args.training_steps,
            "groups_per_step": sequences // args.group_size,
            "rollouts_per_group": args.group_size,
            "max_staleness": max_staleness,
        },
        "model": {"path": args.model_name, "dtype": args.dtype, "max_length": args.seq_len},
        "sampling": {"max_tokens": args.seq_len - 1},
        "environments": [],
        "engine": {"port": args.vllm_port, **_device(args)},
        "trajectory": _listening(*address(args.atropos_url)),
        "learner": {**_device(args), **_learner(args, interval)},
        "bridge": {"name": BRIDGES[mode], "interval": interval},
        "parity": {"interval": interval * math.ceil(PARITY_STEPS / interval)},
    }
    if args.use_wandb:
        names = {"project": args.wandb_project, "group": args.wandb_group}
        values["observe"] = {"sinks": ["wandb"], **{field: name for field, name in names.items() if name}}
    if mode in OWN_ENGINE:
        values["bridge"]["restart"] = "process"
        values["engine"] |= _own_engine(args)
    if mode.startswith("lora"):
        values["model"]["lora"] = _lora(args)
    return values


def _learner(args: argparse.Namespace, interval: int) -> dict[str, Any]:
    """The ratio is to the sampler's logprobs, as in the original; the clip is PPO's for both signs, unlike there."""
    asked = args.checkpoint_interval
    if asked is None:
        asked = 3 if args.weight_bridge_mode == "shared_vllm" else interval
    adapter = "adapter_" if args.weight_bridge_mode.startswith("lora") else ""
    return {
        "token_budget": args.batch_size * args.seq_len,
        "checkpoint_interval": asked or args.training_steps,
        "checkpoint_name": adapter + "step_{step}",
        "num_checkpoints": args.training_steps,
        "unrecorded": "accept",
        "loss": {
            "clip_low": args.clip_eps,
            "clip_high": args.clip_eps,
            "kl_coef": args.kl_coef,
            "old_logprobs": "sampler",
            "importance": {"level": "none"},
        },
        "optimizer": {
            "learning_rate": args.lr,
            "schedule": "constant",
            "num_warmup_steps": args.warmup_steps,
            "betas": [0.9, 0.999],
            "weight_decay": 0.01,
            "moments": "int8" if args.optimizer == "adamw_8bit" else "float32",
        },
    }


def _device(args: argparse.Namespace) -> dict[str, Any]:
    kind, colon, index = args.device.partition(":")
    if colon and not index.isdigit():
        raise ConfigError([f"--device {args.device}: write cuda, cuda:N or cpu"])
    return {"device": kind, **({"devices": [int(index)]} if index else {})}


def _own_engine(args: argparse.Namespace) -> dict[str, Any]:
    used = 0.45 if args.gpu_memory_utilization is None else args.gpu_memory_utilization
    found: dict[str, Any] = {"gpu_memory_utilization": used, "extra": {"max_model_len": -1}}
    return found if args.vllm_gpu is None else found | {"devices": [args.vllm_gpu]}


def _lora(args: argparse.Namespace) -> dict[str, Any]:
    targets: Any = args.lora_target_modules
    if args.lora_layer_indices is not None:
        layers = "|".join(map(str, layer_indices(args.lora_layer_indices)))
        targets = rf".*\.({layers})\..*\b({'|'.join(targets)})"
    return {"rank": args.lora_r, "alpha": args.lora_alpha, "dropout": args.lora_dropout, "target_modules": targets}


def layer_indices(text: str) -> Sequence[int]:
    """`0-3,28-31` → [0, 1, 2, 3, 28, 29, 30, 31]. Raises `ConfigError`."""
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise ConfigError([f"--lora-layer-indices {text}: {part!r} is not a layer or a range; write 0-3,28-31"])
        found += range(int(first), int(last or first) + 1)
    return found


def _listening(host: str, port: int) -> dict[str, Any]:
    """Where a trajectory server would be started; none is on another machine."""
    return {"host": host, "port": port} if host in LOOPBACK else {}


def address(atropos_url: str) -> tuple[str, int]:
    """Raises `ConfigError`."""
    parts = urlsplit(atropos_url)
    try:
        port = parts.port or 80
    except ValueError:
        port = 0
    if parts.scheme != "http" or not parts.hostname or not port:
        raise ConfigError([f"--atropos-url {atropos_url}: is no http://host:port"])
    return "127.0.0.1" if parts.hostname == "localhost" else parts.hostname, port
