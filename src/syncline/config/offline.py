"""The pipeline file: collect → pairs → DPO → evaluate → report, every field and its default, written once.

As strict as a run's configuration: frozen, unknown keys refused, all faults reported together.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from syncline.config.load import read_values, resolve, validated
from syncline.config.offline_collect import PROMPT, Collect, Pairs, Questions
from syncline.config.schema import Bridge, Engine, Model, RunConfig, Section
from syncline.errors import ConfigError

LOSSES = ("sigmoid", "hinge", "ipo", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired", "apo_zero")
LOSSES += ("apo_down", "discopop", "sft", "sigmoid_norm")
"""TRL's names, without what needs label smoothing."""


class OfflineRun(Section):
    dir: str
    """Everything the pipeline writes, a folder a stage: `runs/offline`."""
    seed: NonNegativeInt = 0


class Merge(Section):
    """An adapter that `model.path` is to be merged with before anything else; what comes out is the model."""

    adapter: str
    """A PEFT folder: LoRA, rsLoRA or DoRA."""
    tolerance: PositiveFloat | None = None
    """Largest mean |Δ logprob| between the adapter beside its base and merged. Absent: 1e-4 in float32, 0.02 in
    bfloat16."""
    any_base_name: bool = False
    """Take an adapter whose config names another base, as long as its shapes fit."""


class Guard(Section):
    """The log-probabilities of chosen answers, measured on the same pairs again and again: DPO can widen the margin by
    making both answers unlikely, and then the policy forgets how to answer."""

    interval: PositiveInt = 10
    """Optimizer steps between two measurements."""
    num_pairs: PositiveInt = 64
    """Held-out ones where there are any."""
    max_drop: PositiveFloat = 0.5
    """Nats a token by which the mean may fall below where it began; further down training stops."""


class Dpo(Section):
    num_rounds: PositiveInt = 1
    """Of collect, pairs and DPO; each begins with the policy the last one ended with, its own reference."""
    losses: dict[str, float] = Field(default_factory=lambda: {"sigmoid": 1.0, "sft": 1.0}, min_length=1)
    """TRL's names and weights. `sft` is the negative log-likelihood of the chosen answer."""
    beta: PositiveFloat = 0.1
    learning_rate: PositiveFloat = 1e-5
    schedule: Literal["linear", "cosine", "constant_with_warmup"] = "linear"
    num_warmup_steps: NonNegativeInt = 0
    num_epochs: PositiveFloat = 1.0
    pairs_per_step: PositiveInt = 32
    microbatch_pairs: PositiveInt = 4
    """Divides `pairs_per_step`."""
    max_grad_norm: PositiveFloat = 1.0
    weight_decay: NonNegativeFloat = 0.0
    recompute: bool = False
    """Activations are computed again in the backward pass: less memory, more time."""
    checkpoint_interval: PositiveInt = 20
    """Optimizer steps between two checkpoints to resume from."""
    guard: Guard = Guard()
    device: Literal["auto", "cpu", "cuda"] = "auto"
    devices: tuple[NonNegativeInt, ...] = (0,)
    """One GPU: an adapter is also published to the engines from it, and merged there."""


class Eval(Section):
    sets: Annotated[tuple[Questions, ...], Field(min_length=1)]
    prompt: str = PROMPT
    """A message of the user's; `{question}` is filled in. Sampled answers should come from the same."""
    answers: Literal["v2", "v8", "v11"] = "v2"
    """How answers are read: as numbers, or as a version of Regime W did it."""
    format: str = "Answer:|####"
    """What an answer in the asked form matches, a regular expression."""
    max_tokens: PositiveInt = 512
    num_samples: NonNegativeInt = 0
    """Attempts at each question beside the greedy one, for pass@k and maj@k."""
    temperature: PositiveFloat = 0.7
    """Of these."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    baseline: str | None = None
    """A folder of another evaluation to compare with; absent: with the model before DPO."""
    concurrency: PositiveInt = 512
    """Requests in flight at once on each engine."""
    lost_after_seconds: PositiveFloat = 60.0
    """An engine that does not answer for so long is given up; others do its work meanwhile."""


class Report(Section):
    num_examples: NonNegativeInt = 12
    """Questions shown with the answers before and after, those that changed first."""


class OfflineConfig(Section):
    run: OfflineRun
    model: Model
    """`model.lora` is what DPO trains."""
    engine: Engine = Engine()
    bridge: Bridge = Bridge(name="lora")
    """How a round's adapter reaches the engines: `lora`, or merged by `restart`."""
    merge: Merge | None = None
    collect: Collect
    pairs: Pairs = Pairs()
    dpo: Dpo = Dpo()
    eval: Eval
    report: Report = Report()


def load_offline(path: str | Path, overrides: Sequence[str] = ()) -> OfflineConfig:
    """Raises `ConfigError` with all faults."""
    config = validated(OfflineConfig, read_values(path, overrides))
    faults = [fault for rule in (_model, _dpo, _sets) for fault in rule(config)]
    if faults:
        raise ConfigError(faults)
    try:
        engine_run(config, config.model.path)
    except ConfigError as error:
        raise error.renamed({f"learner.{name}": f"dpo.{name}" for name in ("device", "devices")}) from None
    return config


def engine_run(config: OfflineConfig, model_path: str) -> RunConfig:
    """What `syncline serve` starts the pipeline's engines from; the bridge's rules are a run's."""
    environment = {"task": "arithmetic"}
    """A run has one; nobody samples from it."""
    longest = max(config.collect.max_tokens, config.eval.max_tokens)
    values: dict[str, Any] = {
        "run": {"dir": config.run.dir, "seed": config.run.seed, "num_steps": 1, "groups_per_step": 1},
        "model": config.model.model_dump() | {"path": model_path},
        "sampling": {"max_tokens": longest},
        "environments": [environment],
        "engine": config.engine.model_dump(),
        "learner": {
            "device": config.dpo.device,
            "devices": config.dpo.devices,
            "token_budget": max(8192, config.model.max_length),
        },
        "bridge": config.bridge.model_dump(),
        "parity": {"max_tokens": 1},
        "trajectory": {"lease_seconds": 2 * config.engine.request_timeout_seconds},
    }
    return resolve(values)


def _model(config: OfflineConfig) -> Iterator[str]:
    lora = config.model.lora
    if lora is None:
        yield "model.lora: absent, and DPO trains an adapter; add such as {rank: 16}"
    elif lora.target_modules != "all-linear" and "lm_head" in lora.target_modules:
        yield "model.lora.target_modules: lm_head cannot be adapted by TRL's DPO; leave it out"
    if config.bridge.name not in ("lora", "restart"):
        yield f"bridge.name: {config.bridge.name!r} moves no adapter between rounds; use lora or restart"
    if config.collect.adapter and config.bridge.name != "lora":
        yield f"collect.adapter: engines serve one with bridge.name = lora alone, and it is {config.bridge.name!r}"
    for section in ("collect", "eval"):
        if (asked := getattr(config, section).max_tokens) >= config.model.max_length:
            yield (
                f"{section}.max_tokens: {asked} leaves no room for a prompt in model.max_length = "
                f"{config.model.max_length}; lower the one or raise the other"
            )


def _dpo(config: OfflineConfig) -> Iterator[str]:
    dpo = config.dpo
    if dpo.device != "cpu" and len(set(dpo.devices)) != 1:
        fault = f"{list(dpo.devices)} names {len(set(dpo.devices))} GPUs, and DPO trains on one"
        yield f"dpo.devices: {fault}; name that one, or set dpo.device to cpu"
    if dpo.pairs_per_step % dpo.microbatch_pairs:
        yield f"dpo.microbatch_pairs: {dpo.microbatch_pairs} does not divide pairs_per_step = {dpo.pairs_per_step}"
    for name, weight in dpo.losses.items():
        if name not in LOSSES:
            yield f"dpo.losses.{name}: is none of TRL's losses that this trains: {', '.join(LOSSES)}"
        if weight <= 0:
            yield f"dpo.losses.{name}: {weight} must be > 0; leave a loss out instead"
    if set(dpo.losses) == {"sft"}:
        yield "dpo.losses: sft alone has no preference in it; add sigmoid, or another of TRL's losses"


def _sets(config: OfflineConfig) -> Iterator[str]:
    sources = {f"eval.sets.{i}": own for i, own in enumerate(config.eval.sets)}
    for where, own in {**sources, "collect.questions": config.collect.questions}.items():
        given = [field for field in ("path", "hub", "made") if getattr(own, field) is not None]
        if len(given) != 1:
            yield f"{where}: has {' and '.join(given) or 'no source'}; give exactly one of path, hub and made"
    names = [own.name for own in config.eval.sets]
    for i, own in enumerate(config.eval.sets):
        if own.name in names[:i]:
            yield f"eval.sets.{i}.name: {own.name!r} is taken by eval.sets.{names.index(own.name)}; give it another"
    try:
        re.compile(config.eval.format)
    except re.error as error:
        yield f"eval.format: {config.eval.format!r} is no regular expression ({error}); mend it"
    for section in ("collect", "eval"):
        if "{question}" not in (prompt := getattr(config, section).prompt):
            yield f"{section}.prompt: {prompt!r} has no {{question}} to fill in; add it"
