"""The learner as `grpo.py` starts it: `syncline train`, with the lines that Atropos' example trainer promises.

Each line is printed after what it tells has happened: `log` is called when the step's publish was proved on both sides.
"""

import argparse
import logging
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from trainer_flags import FLAGS

from syncline.cli.train import add_arguments, learn
from syncline.config import RunConfig, load
from syncline.errors import ConfigError, SynclineError
from syncline.learner.loop import Parts, publishes_after
from syncline.observe.sinks import MultiSink
from syncline.types import RolloutGroup


class PromisedLines:
    """`MetricSink` that prints."""

    def __init__(self, config: RunConfig) -> None:
        self._config = config

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        print(f"Step {step}/{self._config.run.num_steps}")
        print(f"  Loss: {metrics['loss']:.4f}, Grad norm: {metrics.get('grad_norm', 0.0):.4f}")
        if "clip_ratio/region_mean" in metrics:
            apart = metrics["sampling/sampling_logp_difference/mean"]
            print(f"    GRPO: clipped={100 * metrics['clip_ratio/region_mean']:.1f}%, |logp - inference|={apart:.5f}")
        if "reward" in metrics:
            print(f"    Reward: mean={metrics['reward']:.4f}, std={metrics['reward_std']:.4f}")
        print(self._synced(step, metrics), flush=True)

    def log_rollouts(
        self, step: int, groups: Iterable[RolloutGroup], advantages: Mapping[str, Sequence[float]]
    ) -> None: ...

    def close(self) -> None: ...

    def _synced(self, step: int, metrics: Mapping[str, float]) -> str:
        version, bridge = int(metrics["policy_version"]), self._config.bridge
        if bridge.name == "shared":
            done = "Nothing to learn, weights unchanged" if metrics.get("step/skipped") else "Weights updated in-place"
            return f"  [SINGLE-COPY] {done} - step {step}"
        if not publishes_after(step, self._config):
            return f"  Next sync after step {min(step + -step % bridge.interval, self._config.run.num_steps)}"
        done = "[LORA] ✓ Hot-swapped adapter" if bridge.name == "lora" else "[LEGACY] ✓ vLLM restarted"
        return f"  {done}: policy version {version}, {metrics['time/sync_seconds']:.2f} s"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    parser.add_argument("--debug-loading", action="store_true")
    args = parser.parse_args()
    config = load(args.file, args.overrides)

    def watch(parts: Parts) -> Parts:
        resumed = parts.checkpoints.newest_step()
        print("\n".join(set_up(config, parts, resumed, told=args.debug_loading)), flush=True)
        return replace(parts, sink=MultiSink([parts.sink, PromisedLines(config)]))

    try:
        return learn(config, args, watch=watch)
    except SynclineError as error:
        told = error.renamed(FLAGS) if isinstance(error, ConfigError) else error
        print(f"grpo.py: {told}", file=sys.stderr)
        return error.exit_code


def set_up(config: RunConfig, parts: Parts, resumed: int, *, told: bool) -> list[str]:
    """The bridge has attached the model: with `shared` every parameter is a view of vLLM's by now, or it had raised."""
    named = list(parts.model.named_parameters())
    lines: list[str] = []
    if config.bridge.name == "shared":
        lines.append(f"[Setup] ✓ Attached {len(named)} tensors to vLLM's shared memory")
        lines.append("[Setup] ✓ Single-copy mode active - using vLLM's tensors directly!")
    if config.model.lora:
        trained = [parameter.numel() for parameter in parts.model.parameters() if parameter.requires_grad]
        lines.append(f"[Setup] ✓ LoRA adapter: {sum(trained)} trainable parameters in {len(trained)} tensors")
    if told:
        lines += [f"[Setup]   {name} {list(p.shape)} {p.dtype} {p.device}" for name, p in named]
    if resumed:
        lines.append(f"[Setup] ✓ Resuming after step {resumed}")
    return [*lines, f"[2/2] Starting training for {config.run.num_steps} steps"]


if __name__ == "__main__":
    logging.captureWarnings(True)
    sys.exit(main())
