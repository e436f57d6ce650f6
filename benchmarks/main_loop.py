"""The main loop's step time, broken into sample / learn / sync, on a model of a real shape with random weights.

    python benchmarks/main_loop.py --shape qwen2.5-0.5b --steps 8
    python benchmarks/main_loop.py run.max_staleness=1 bridge.in_flight=keep     # sampling while learning

What `trl_step.py` has TRL do is `--groups 32 --max-tokens 512 --prompt-tokens 128 --micro-batch 16` of it, with
`--bridge shared`, and `--replicas 2` for two engines on one copy of the weights. Beside its server mode, `trl_step.py
--server`, goes the same with `--bridge broadcast`: the learner on the first GPU, each engine on another, as there.

Runs `syncline run` as a user would and prints a table of its own metrics; the first two steps (compilation, caches)
are left out of the means. Absolute times mean something on a GPU only. With `--limit-gb 80` all processes together have
80 GB of the GPU, whatever it has; the table says what was in use at most.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import gpus
import within_deadline
import yaml

from syncline.bench.shapes import SHAPES, make_model
from syncline.launch.plan import Machine

WARM_UP_STEPS = 2
ROWS = (
    ("step", "time/step_seconds"),
    ("  sample (wait)", "time/wait_seconds"),
    ("  learn", "time/learn_seconds"),
    ("  sync", "time/sync_seconds"),
    ("    digest (learner)", "sync/digest_seconds"),
    ("    engine paused", "sync/pause_seconds"),
)


def main() -> int:
    started = time.monotonic()
    parser = argparse.ArgumentParser(description="Step time of the main loop.")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="qwen2.5-0.5b")
    parser.add_argument("--bridge", choices=("restart", "shared", "broadcast", "lora"), default="restart")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--groups", type=int, default=16)
    parser.add_argument("--rollouts", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--prompt-tokens", type=int, default=0, help="shortest prompt")
    parser.add_argument("--micro-batch", type=int, help="in completions of full length; absent: 16384 tokens")
    parser.add_argument("--replicas", type=int, default=1, help="engines: with broadcast a GPU each, else on one")
    parser.add_argument("--device", choices=("auto", "cpu"), default="auto")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "syncline-main-loop")
    parser.add_argument("--deadline", type=float, default=900.0, help="seconds until the table of what is known then")
    parser.add_argument("--limit-gb", type=float, help="of the first GPU, for all processes together")
    parser.add_argument("--json", type=Path, help="write the means there too")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="fields set over the benchmark's own")
    args = parser.parse_args()
    model = args.folder / args.shape
    if not (model / "config.json").exists():
        make_model(args.shape, model, max_length=4096)
    run_dir = args.folder / f"run-{args.shape}-{args.bridge}"
    file = args.folder / "run.yaml"
    file.write_text(yaml.safe_dump(values(args, model, run_dir)))
    environment = os.environ | {"PYTHONPATH": f"{Path(__file__).parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, "-m", "syncline", "run", str(file), *args.overrides, "--overwrite"]
    metrics = run_dir / "metrics.jsonl"
    metrics.unlink(missing_ok=True)
    with (
        gpus.limited_to(args.limit_gb) as held,
        gpus.watched(Machine.here().gpus, "memory.used") as used,
        subprocess.Popen(command, env=environment, start_new_session=True) as run,
    ):
        why = within_deadline.wait(run, until=started + args.deadline)
    failed = 0 if why else run.returncode
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    steps = [json.loads(line) for line in lines if line.endswith("}")][WARM_UP_STEPS:]
    if not steps:
        ended = why or f"exit code {failed}"
        print(f"no step to count: {ended}, and {len(lines)} steps were done", file=sys.stderr)
        return failed or 1
    means = {key: sum(step[key] for step in steps) / len(steps) for _, key in ROWS}
    tokens = sum(step["tokens/sampled"] for step in steps) / len(steps)
    print(
        f"\n{args.shape}, {args.bridge} bridge, {args.groups} x {args.rollouts} rollouts, {tokens:.0f} tokens a step, "
        f"mean of {len(steps)} steps"
    )
    for title, key in ROWS:
        print(f"{title:<24}{means[key]:9.3f} s  {100 * means[key] / means['time/step_seconds']:5.1f} %")
    print(f"{'sampled':<24}{tokens / means['time/wait_seconds']:9.0f} tokens/s")
    print(f"{'trained':<24}{tokens / means['time/learn_seconds']:9.0f} tokens/s")
    if used:
        print(f"{'GPU memory in use':<24}{(max(used) * 2**20 - held) / 1e9:9.1f} GB at most")
    print(f"{'parity, first step':<24}{json.dumps({k: v for k, v in steps[-1].items() if k.startswith('parity')})}")
    print(f"{'reward':<24}{steps[0]['reward']:.3f} -> {steps[-1]['reward']:.3f}")
    if args.json:
        args.json.write_text(json.dumps({"shape": args.shape, "bridge": args.bridge, "tokens": tokens} | means))
    return failed


def engine(args: argparse.Namespace) -> dict:
    """Several on one GPU have a KV cache each: 256 sequences of 640 tokens of the 1.5B shape are 4.7 GB."""
    apart = args.bridge == "broadcast"
    size = {"gpu_memory_utilization": 0.4}
    if args.replicas > 1 and args.device != "cpu" and not apart:
        size = {"gpu_memory_utilization": 0.1, "extra": {"kv_cache_memory_bytes": 6 << 30}}
    devices = list(range(1, 1 + args.replicas)) if apart else [0]  # the learner's is the first; ignored on a CPU
    return {"device": args.device, "devices": devices, "num_replicas": args.replicas, "max_num_seqs": 512} | size


def values(args: argparse.Namespace, model: Path, run_dir: Path) -> dict:
    budget = args.micro_batch * (args.prompt_tokens + args.max_tokens) if args.micro_batch else 16384
    return {
        "run": {
            "dir": str(run_dir),
            "num_steps": args.steps,
            "groups_per_step": args.groups,
            "rollouts_per_group": args.rollouts,
        },
        "model": {"path": str(model), "max_length": 2048, "lora": {"rank": 32} if args.bridge == "lora" else None},
        "sampling": {"max_tokens": args.max_tokens},
        "environments": [{"task": "even_tokens:EvenTokens", "args": {"prompt_tokens": args.prompt_tokens}}],
        "engine": engine(args),
        "learner": {"device": args.device, "token_budget": budget, "checkpoint_interval": 1000}
        | {"optimizer": {"learning_rate": 1e-6}},
        "bridge": {"name": args.bridge},
        "parity": {"interval": args.steps, "prompts": ["The capital of France is", "2 + 2 ="]},
    }


if __name__ == "__main__":
    sys.exit(main())
