"""What the learner's forward and backward passes cost: ours, TRL's, and what the machine's matrix products allow.

Same weights, same rollouts, same loss (dapo, on-policy, no KL). Useful tokens are prompt and completion, without
padding; useful operations are 6 a token and weight of a matrix product (2 forward, 4 backward), the head's for scored
tokens alone, attention's and recomputed ones for none.
"""

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from syncline.bench.shapes import VOCABULARY, build_model
from syncline.config.schema import Importance, Learner, Loss
from syncline.learner.advantages import group_advantages
from syncline.learner.attention_choice import choose_attention
from syncline.learner.model import Scorer, run_layers_as
from syncline.learner.optim import accumulate_fp32
from syncline.learner.packing import pack
from syncline.learner.step import Step
from syncline.observe.metrics import Metrics
from syncline.types import Rollout, RolloutGroup, RolloutStatus, TrainingSample, VersionSpan

LOSS = Loss(name="dapo", importance=Importance(level="none"))
TEMPERATURE = 1.0


@dataclass(frozen=True)
class Load:
    """Rollouts of one kind: prompts of `prompt` tokens, completions of `completions` tokens each."""

    name: str
    prompt: int
    completions: tuple[int, ...]
    rollouts_per_group: int

    @classmethod
    def equal(cls, *, prompt: int, completion: int, num_rollouts: int, rollouts_per_group: int) -> "Load":
        return cls(f"equal {prompt + completion}", prompt, (completion,) * num_rollouts, rollouts_per_group)

    @classmethod
    def mixed(cls, *, prompt: int, bounds: tuple[int, int], num_rollouts: int, rollouts_per_group: int) -> "Load":
        """Lengths uniform between the bounds, both of which occur."""
        draw = random.Random(0)
        lengths = [*bounds, *(draw.randint(*bounds) for _ in range(num_rollouts - 2))]
        draw.shuffle(lengths)
        return cls(f"mixed {bounds[0]}-{bounds[1]}", prompt, tuple(lengths), rollouts_per_group)

    @property
    def num_tokens(self) -> int:
        return self.prompt * len(self.completions) + sum(self.completions)

    @cached_property
    def groups(self) -> list[RolloutGroup]:
        draw, size = random.Random(1), self.rollouts_per_group
        rollouts = [self._rollout(draw, length) for length in self.completions]
        return [
            RolloutGroup(f"group-{i}", "random tokens", i, tuple(rollouts[i * size : (i + 1) * size]))
            for i in range(len(rollouts) // size)
        ]

    def _rollout(self, draw: random.Random, length: int) -> Rollout:
        tokens = tuple(draw.randrange(3, VOCABULARY) for _ in range(self.prompt + length))
        sample = TrainingSample(
            token_ids=tokens,
            loss_mask=(False,) * self.prompt + (True,) * length,
            logprobs=(0.0,) * self.prompt + (-math.log(VOCABULARY),) * length,
            versions=(VersionSpan(0, self.prompt, self.prompt + length),),
        )
        return Rollout((sample,), draw.random(), RolloutStatus.COMPLETED)


@dataclass(frozen=True, slots=True)
class Reading:
    """Of one learner on one load."""

    name: str
    shape: str
    load: str
    seconds: float
    """Of a pass over all rollouts, the shortest measured."""
    useful_tokens: int
    computed_tokens: int
    """With padding."""
    microbatch_tokens: int
    """The largest micro-batch's, with padding."""
    useful_flops: float
    activation_bytes: int | None
    """The most a micro-batch added to weights and gradients; `None` on a CPU."""
    gradient_norm: float

    @property
    def tokens_per_second(self) -> float:
        return self.useful_tokens / self.seconds

    @property
    def bytes_per_token(self) -> float | None:
        return None if self.activation_bytes is None else self.activation_bytes / self.microbatch_tokens

    def mfu(self, matmul_rate: float) -> float:
        return self.useful_flops / self.seconds / matmul_rate


def matmul_rate(device: torch.device) -> float:
    """FLOP/s of a large matrix product in the type trained in, on random data."""
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (512, torch.float32)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds = min(_seconds(lambda: a @ b, device) for _ in range(8))
    return 2 * size**3 / seconds


def ours(shape: str, load: Load, *, name: str, running: Learner, device: torch.device, passes: int) -> Reading:
    """The product's own step, packing included."""
    model, step = built(shape, load, running, device), step_of(running, load, device)
    if running.gradients == "float32":
        accumulate_fp32(model)
    run_layers_as(running, model, device=device)
    advantages = group_advantages(load.groups, LOSS.scale_advantages)

    def once() -> dict[str, float]:
        report = Metrics()
        step.backward(model, load.groups, advantages, report, optimizer=None, step=0)  # type: ignore[arg-type]
        return report.reduced()

    seconds, held, report, norm = measured(once, model, device, passes)
    peak = report.get("memory/microbatch_peak_bytes")
    how = {"loss": LOSS, "token_budget": running.token_budget, "max_completion_tokens": max(load.completions)}
    largest = max(batch.num_tokens for batch in pack(load.groups, advantages, **how))
    return Reading(
        name, shape, load.name, seconds, load.num_tokens, load.num_tokens, largest,
        useful_flops(model, load), None if peak is None else int(peak) - held, norm,
    )  # fmt: skip


def built(shape: str, load: Load, running: Learner, device: torch.device) -> Any:
    """A model with random weights and the attention asked for."""
    model = plain_model(shape, load, device)
    model.set_attn_implementation(choose_attention(running.attention, model.config, device=device, dtype=model.dtype))
    return model


def step_of(running: Learner, load: Load, device: torch.device) -> Step:
    return Step(
        config=running,
        scorer=Scorer(TEMPERATURE, running.logprob_chunk_tokens),
        reference=None,
        device=device,
        max_completion_tokens=max(load.completions),
        num_steps=2,
    )


def useful_flops(model: Any, load: Load) -> float:
    head = model.get_output_embeddings().weight.numel()
    body = sum(p.numel() for p in model.get_decoder().parameters()) - model.get_input_embeddings().weight.numel()
    return 6.0 * (body * load.num_tokens + head * sum(load.completions))


def plain_model(shape: str, load: Load, device: torch.device) -> Any:
    model = build_model(shape, max_length=load.prompt + max(load.completions) + 1, device=device.type)
    model.config.use_cache = False
    return (model if device.type == "cuda" else model.float()).train()


def measured(
    once: Callable[[], dict[str, float]], model: Any, device: torch.device, passes: int
) -> tuple[float, int, dict[str, float], float]:
    """Shortest pass, bytes held between passes, the last pass's report, and the norm of one pass's gradient."""
    once()
    norm = _gradient_norm(model)
    held = torch.cuda.memory_allocated() if device.type == "cuda" else 0
    seconds, report = math.inf, {}
    for _ in range(passes):
        started = time.perf_counter()
        report = once()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = min(seconds, time.perf_counter() - started)
    return seconds, held, report, norm


def _gradient_norm(model: Any) -> float:
    both = [(p.grad, getattr(p, "main_grad", None)) for p in model.parameters()]
    gradients = [gradient for pair in both for gradient in pair if gradient is not None]
    return torch.stack([torch.linalg.vector_norm(g, dtype=torch.float32) for g in gradients]).norm().item()


def _seconds(work: Callable[[], Any], device: torch.device) -> float:
    if device.type != "cuda":
        started = time.perf_counter()
        work()
        return time.perf_counter() - started
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def table(readings: Sequence[Reading], rate: float, device: str) -> list[str]:
    """A block a shape and load, each compared with TRL's fastest whole path: speed, and memory a token."""
    lines = [f"{device}; matrix products {rate / 1e12:.3g} TFLOP/s; MFU counts useful tokens alone"]
    for shape, load in dict.fromkeys((r.shape, r.load) for r in readings):
        mine = [r for r in readings if (r.shape, r.load) == (shape, load)]
        lines += ["", f"{shape}, {load}: {mine[0].useful_tokens} useful tokens", _row(HEAD)]
        theirs = [r for r in mine if r.name.startswith("TRL") and "alone" not in r.name]
        fastest = max(theirs, key=lambda r: r.tokens_per_second, default=None)
        lines += [_row(_cells(r, rate, fastest)) for r in mine]
        floor = mine[0].useful_flops / rate
        lines.append(_row(("limit: products alone", f"{mine[0].useful_tokens / floor:.0f}", "", "100.0 %")))
    return lines


HEAD = ("", "tokens/s", "over TRL", "MFU", "micro-batch", "activations", "KiB/token", "of TRL's", "grad norm")


def _cells(reading: Reading, rate: float, fastest: Reading | None) -> tuple[str, ...]:
    ratio, memory, per_token, share = "-", "-", "-", "-"
    if fastest:
        ratio = f"{reading.tokens_per_second / fastest.tokens_per_second:.2f} x"
    if reading.bytes_per_token is not None:
        memory, per_token = f"{(reading.activation_bytes or 0) / 1e9:.2f} GB", f"{reading.bytes_per_token / 1024:.0f}"
    if reading.bytes_per_token is not None and fastest and fastest.bytes_per_token:
        share = f"{reading.bytes_per_token / fastest.bytes_per_token:.2f} x"
    mfu = f"{100 * reading.mfu(rate):.1f} %"
    speed = f"{reading.tokens_per_second:.0f}"
    norm = f"{reading.gradient_norm:.4g}"
    return (reading.name, speed, ratio, mfu, str(reading.microbatch_tokens), memory, per_token, share, norm)


def _row(cells: Sequence[str]) -> str:
    return f"{cells[0]:<36}" + "".join(f"{cell:>13}" for cell in cells[1:])
