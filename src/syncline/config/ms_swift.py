"""A GRPO file of ms-swift → our fields: every key is translated, said to change nothing here, or refused with its path.

Trainer connectivity stays in `rlhf.*`; `custom.extra.rollout_server.*` are the server's own settings, which with
`vllm_mode: server` may stand nowhere else, because a server that runs apart never sees the trainer's. The tables of
`ms_swift_keys.py` say what becomes of each key; what depends on several is here.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from syncline.config import ms_swift_keys as keys

SERVER = "custom.extra.rollout_server"
LOCAL_HOSTS = ("127.0.0.1", "localhost")
_MISSING = object()


@dataclass(slots=True)
class Translation:
    """What became of a file. `origins`: our field → the path it came from; `notes`: keys that change nothing here."""

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    is_apart: bool = False
    """The engines are servers, whose settings stand apart."""

    def set(self, ours: str, value: Any, path: str) -> None:
        here = self.values
        *sections, last = ours.split(".")
        for section in sections:
            here = here.setdefault(section, {})
        here[last] = value
        self.origins[ours] = path


def is_ms_swift(values: Mapping[str, Any]) -> bool:
    """By its content: a section `rlhf`, and no section `run`, which every file of ours has."""
    return isinstance(values.get("rlhf"), dict) and "run" not in values


def translate(values: Mapping[str, Any]) -> Translation:
    """Every key of the file, read once. What is left over at the end is unknown."""
    found, given = Translation(), _Given(_flat(values))
    found.faults += _numbers(given.left)
    for path, ours in keys.TRANSLATED.items():
        if (value := given.take(path)) is not _MISSING and value is not None:
            found.set(ours, value, path)
    for path, (allowed, why) in keys.FIXED.items():
        if (value := given.take(path)) is not _MISSING and value not in allowed:
            shown = " or ".join(map(repr, allowed))
            found.faults.append(f"{path}: {value!r} {why}; set it to {shown}")
    for path, choices in keys.CHOICES.items():
        _choose(found, given, path, choices)
    for part in (_server, _model, _adapter, _sampling, _batch, _optimizer, _loss, _rewards):
        found.faults += part(found, given)
    _leave_out(found, given)
    return found


class _Given:
    """The file's values by dotted path; each is taken once."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.left = values

    def take(self, path: str, default: Any = _MISSING) -> Any:
        return self.left.pop(path, default)


def _numbers(left: dict[str, Any]) -> Iterator[str]:
    """Numbers that are reckoned with, as such; others are left out."""
    for path in sorted(keys.NUMBERS & left.keys()):
        value = left[path]
        number = value if _is_number(value) and math.isfinite(value) else _whole(value)
        if value is None or number is None:
            del left[path]
        else:
            left[path] = number
        if value is not None and number is None:
            yield f"{path}: {value!r} must be a number"


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted path → value; the mappings that are values themselves stay whole."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        path = f"{prefix}.{name}" if prefix else str(name)
        if isinstance(value, dict) and value and path not in keys.WHOLE:
            flat |= _flat(value, path)
        else:
            flat[path] = value
    return flat


def _choose(found: Translation, given: _Given, path: str, choices: Mapping[Any, Any]) -> None:
    value = given.take(path)
    if value is _MISSING or value is None:
        return
    if not isinstance(value, str | bool) or value not in choices:
        known = ", ".join(str(choice) for choice in choices)
        found.faults.append(f"{path}: {value!r} has no counterpart here; use one of {known}")
        return
    for ours, translated in choices[value].items():
        if (other := found.origins.get(ours)) and (said := _at(found, ours)) not in (translated, keys.PLAIN_LOSS):
            found.faults.append(f"{path}: {value!r} is {translated!r} here, and {other} says {said!r}; leave one out")
        found.set(ours, translated, path)


def _at(found: Translation, ours: str) -> Any:
    here: Any = found.values
    for part in ours.split("."):
        here = here[part]
    return here


def _server(found: Translation, given: _Given) -> Iterator[str]:
    """Who samples, where, and with what: the rules of the split."""
    mode = given.take("rlhf.vllm_mode", None)
    if (used := given.take("rlhf.use_vllm", None)) is not True:
        yield f"rlhf.use_vllm: {used!r}, but vLLM alone samples here; set it to true"
    if mode not in ("server", "colocate"):
        yield f"rlhf.vllm_mode: {mode!r} is unknown; set it to server or colocate"
        return
    found.is_apart = mode == "server"
    section = SERVER if found.is_apart else "rlhf"
    yield from _misplaced(given, mode)
    if found.is_apart:
        yield from _address(found, given)
    for name, ours in keys.ENGINE.items():
        if (value := given.take(f"{section}.{name}")) is not _MISSING:
            yield from _engine_value(found, f"{section}.{name}", ours, value)
    if given.take(f"{section}.vllm_use_async_engine", True) is not True:
        yield f"{section}.vllm_use_async_engine: false, but engines here are always asynchronous; leave it out"
    yield from _own_options(found, given, section)
    yield from _lengths(found, given, section)
    ranks = [found.values.get("engine", {}).get(name, 1) for name in ("tensor_parallel_size", "num_replicas")]
    if found.is_apart and all(isinstance(size, int) for size in ranks):
        size = math.prod(ranks)
        found.set("engine.devices", list(range(size)), f"{SERVER}.vllm_tensor_parallel_size × vllm_data_parallel_size")
        found.set("learner.devices", [size], "rlhf.vllm_mode")


def _misplaced(given: _Given, mode: str) -> Iterator[str]:
    """Settings where the chosen mode would ignore them."""
    for path in list(given.left):
        section, _, name = path.rpartition(".")
        if mode == "server" and section == "rlhf" and name in keys.SERVER_KEYS:
            given.take(path)
            yield f"{path}: is the server's, which runs apart and would ignore it; move it to {SERVER}.{name}"
        if mode == "colocate" and path.startswith(SERVER):
            given.take(path)
            yield f"{path}: rlhf.vllm_mode = 'colocate' starts no server; move it to rlhf, or set the mode to server"
        if mode == "colocate" and section == "rlhf" and name.startswith("vllm_server_"):
            given.take(path)
            yield f"{path}: rlhf.vllm_mode = 'colocate' connects to no server; leave it out, or set the mode to server"
        if section == SERVER and name not in keys.SERVER_KEYS:
            given.take(path)
            yield f"{path}: unknown key; the server's are {', '.join(keys.SERVER_KEYS)}"
    if mode == "server":
        for name in keys.REQUIRED:
            if given.left.get(f"{SERVER}.{name}") is None:
                yield f"{SERVER}.{name}: required, but missing; add it"


def _address(found: Translation, given: _Given) -> Iterator[str]:
    hosts, ports = (_listed(given.take(f"rlhf.vllm_server_{name}", None)) for name in ("host", "port"))
    if len(hosts) != 1 or hosts[0] not in LOCAL_HOSTS:
        yield f"rlhf.vllm_server_host: {hosts} must be one of {', '.join(LOCAL_HOSTS)}; others go by engine.servers"
    if len(ports) != 1 or (port := _whole(ports[0])) is None or not 1 <= port <= 65535:
        yield f"rlhf.vllm_server_port: {ports} must be one port of 1 to 65535; replica i listens on port + i"
        return
    found.set("engine.port", port, "rlhf.vllm_server_port")


def _engine_value(found: Translation, path: str, ours: str, value: Any) -> Iterator[str]:
    name = path.rpartition(".")[2]
    if name in keys.WHOLE_NUMBERS:
        if (number := _whole(value)) is None or number < 1:
            yield f"{path}: {value!r} must be a whole number above 0"
            return
        value = number
    if name == "vllm_gpu_memory_utilization" and not (_is_number(value) and 0 < value <= 1):
        yield f"{path}: {value!r} must be above 0 and at most 1, a share of each GPU's memory"
        return
    if name == "vllm_quantization" and not isinstance(value, str):
        yield f"{path}: {value!r} must be the name of a method, such as fp8"
        return
    found.set(ours, value, path)


def _own_options(found: Translation, given: _Given, section: str) -> Iterator[str]:
    """vLLM's options that ms-swift hands on, as a mapping or as JSON."""
    path = f"{section}.vllm_engine_kwargs"
    options = given.take(path, None) or {}
    if isinstance(options, str):
        try:
            options = json.loads(options)
        except json.JSONDecodeError as error:
            yield f"{path}: {options!r} is not JSON: {error}"
            return
    if not isinstance(options, dict):
        yield f"{path}: {options!r} must be a mapping of vLLM's options"
        return
    extra = found.values.get("engine", {}).get("extra", {})
    for name, value in options.items():
        if name in extra or name in keys.ENGINE_OPTIONS:
            yield f"{path}.{name}: is said twice, or has a key of its own; leave it out"
        else:
            found.set(f"engine.extra.{name}", value, f"{path}.{name}")


def _lengths(found: Translation, given: _Given, section: str) -> Iterator[str]:
    context = found.values.get("model", {}).pop("max_length", None)
    total = given.take("global_max_length", None)
    longest = found.values.get("sampling", {}).get("max_tokens")
    if context and total and context < total:
        yield f"{section}.vllm_max_model_len: {context} cannot hold global_max_length = {total}; raise it"
    if context and longest and context <= longest:
        yield (
            f"{section}.vllm_max_model_len: {context} leaves no room for a prompt beside "
            f"rlhf.max_completion_length = {longest}; raise the one or lower the other"
        )
    if whole := total or context:
        found.set("model.max_length", whole, "global_max_length" if total else f"{section}.vllm_max_model_len")


def _model(found: Translation, given: _Given) -> Iterator[str]:
    if "path" not in found.values.get("model", {}):
        yield "model.model: required, but missing; name a folder or a model of the hub"
    if (implementation := given.take("model.attn_impl", None)) is not None:
        found.set("learner.attention", keys.ATTENTION.get(str(implementation), implementation), "model.attn_impl")
    fate = "adapted" if given.left.get("tuner.train_type", "lora") == "lora" else "trained"
    for part, ours in (("vit", "vision"), ("aligner", "aligner")):
        frozen, rate = given.take(f"tuner.freeze_{part}", True), given.take(f"training.{part}_lr", None)
        if frozen is not True:
            found.set(f"model.parts.{ours}", fate, f"tuner.freeze_{part}")
            if rate is not None:
                found.set(f"learner.optimizer.{ours}_learning_rate", rate, f"training.{part}_lr")
        elif rate is not None:
            found.notes.append(f"training.{part}_lr: {rate} changes nothing: tuner.freeze_{part} is true")


def _adapter(found: Translation, given: _Given) -> Iterator[str]:
    kind, section = given.take("tuner.train_type", "lora"), SERVER if found.is_apart else "rlhf"
    serves, largest = (given.take(f"{section}.{name}", None) for name in ("vllm_enable_lora", "vllm_max_lora_rank"))
    dora = given.take("tuner.use_dora", False)
    targets, pattern = given.take("tuner.target_modules", None), given.take("tuner.target_regex", None)
    ranks = {name: given.take(f"tuner.{name}", None) for name in keys.LORA}
    if kind == "lora":
        for name, value in ranks.items():
            if value is not None:
                found.set(f"model.lora.{keys.LORA[name]}", value, f"tuner.{name}")
        found.set("model.lora.dora", bool(dora), "tuner.use_dora")
        if chosen := pattern or (None if targets in (None, ["all-linear"], "all-linear") else targets):
            found.set("model.lora.target_modules", chosen, "tuner.target_regex" if pattern else "tuner.target_modules")
    elif kind != "full":
        yield f"tuner.train_type: {kind!r} has no counterpart here; use lora or full"
    if serves and kind != "lora":
        yield f"{section}.vllm_enable_lora: true, and tuner.train_type = {kind!r} has no adapter; set it to false"
    elif serves and dora:
        yield (
            f"{section}.vllm_enable_lora: true, but vLLM serves no DoRA (tuner.use_dora); set it to false: the "
            "adapter then reaches the server merged"
        )
    elif serves and "limit_mm_per_prompt" in found.values.get("engine", {}).get("extra", {}):
        yield (
            f"{section}.vllm_enable_lora: true, but adapters of multimodal towers are not served; set it to false: the "
            "adapter then reaches the server merged"
        )
    if largest is not None and not (serves and _whole(largest) and largest >= (ranks["lora_rank"] or 8)):
        yield f"{section}.vllm_max_lora_rank: {largest!r} is set from tuner.lora_rank; leave it out"
    apart, together = "lora" if serves else "broadcast", "restart" if kind == "lora" and dora else "shared"
    found.set("bridge.name", apart if found.is_apart else together, "rlhf.vllm_mode")


def _sampling(found: Translation, given: _Given) -> Iterator[str]:
    top_k = given.take("rlhf.top_k", None)
    if top_k is not None:
        found.set("sampling.top_k", max(0, top_k) if isinstance(top_k, int) else top_k, "rlhf.top_k")
    if "max_tokens" not in found.values.get("sampling", {}):
        yield "rlhf.max_completion_length: required, but missing; add it"


def _batch(found: Translation, given: _Given) -> Iterator[str]:
    """Completions of a step and of a micro-batch → groups and tokens."""
    group = max(1, found.values.get("run", {}).get("rollouts_per_group", 8))
    total = given.take("training.effective_batch_size", None)
    sampled = given.take("rlhf.generation_batch_size", None)
    per_device = given.take("training.per_device_train_batch_size", 1)
    if (accumulated := given.take("training.gradient_accumulation_steps", None)) is not None:
        yield (
            f"training.gradient_accumulation_steps: {accumulated} depends on the number of GPUs; say how many "
            "completions a step has as training.effective_batch_size"
        )
    if (step := _whole(total if total is not None else sampled)) is None or step < 1:
        yield "training.effective_batch_size: required: the completions of a step, a whole number; add it"
        return
    for path, size in (("training.effective_batch_size", total), ("rlhf.generation_batch_size", sampled)):
        if size is not None and (_whole(size) or 0) % group:
            yield f"{path}: {size} is no multiple of rlhf.num_generations = {group}; change one of them"
            return
    if sampled is not None and _whole(sampled) != step:
        yield (
            f"rlhf.generation_batch_size: {sampled} is not training.effective_batch_size = {total}; each step samples "
            "for itself here, so set both alike, and rlhf.async_generate to sample ahead"
        )
    found.set("run.groups_per_step", step // group, "training.effective_batch_size")
    if length := found.values.get("model", {}).get("max_length"):
        budget = max(1, _whole(per_device) or 1) * length
        found.set("learner.token_budget", budget, "training.per_device_train_batch_size")
    yield from _steps(found, given, step // group)
    tries = given.take("rlhf.max_resample_times", 3)
    if given.take("rlhf.dynamic_sample", False):
        found.set("run.max_refills", tries * (step // group), "rlhf.max_resample_times")


def _steps(found: Translation, given: _Given, groups: int) -> Iterator[str]:
    """`max_steps`, or so many epochs of the training rows, which are counted."""
    steps, epochs = given.take("training.max_steps", None), given.take("training.num_train_epochs", None)
    rows = given.left.get("custom.train_jsonl")
    if steps is None or steps == -1:
        if epochs is None:
            yield "training.max_steps: required where training.num_train_epochs is absent; add one of them"
            return
        try:
            with Path(str(rows)).open("rb") as lines:
                steps = max(1, math.ceil(epochs * sum(1 for _ in lines) / groups))
        except OSError as error:
            yield f"training.num_train_epochs: {epochs} of custom.train_jsonl = {rows!r}, unreadable: {error.strerror}"
            return
    found.set("run.num_steps", steps, "training.max_steps")


def _optimizer(found: Translation, given: _Given) -> Iterator[str]:
    steps = found.values.get("run", {}).get("num_steps")
    ratio = given.take("training.warmup_ratio", None)
    if ratio is not None and steps and not found.values.get("learner", {}).get("optimizer", {}).get("num_warmup_steps"):
        found.set("learner.optimizer.num_warmup_steps", math.ceil(ratio * steps), "training.warmup_ratio")
    options = given.take("training.lr_scheduler_kwargs", None) or {}
    if not isinstance(options, dict) or set(options) - {"min_lr"}:
        yield f"training.lr_scheduler_kwargs: {options} has keys other than min_lr; leave them out"
    elif "min_lr" in options:
        found.set("learner.optimizer.min_learning_rate", options["min_lr"], "training.lr_scheduler_kwargs.min_lr")
    betas = [given.take(f"training.adam_beta{i}", default) for i, default in ((1, 0.9), (2, 0.95))]
    found.set("learner.optimizer.betas", betas, "training.adam_beta1")
    if given.take("training.gradient_checkpointing", True):
        found.set("learner.recomputation.what", "full", "training.gradient_checkpointing")
    if given.take("training.bf16", True) is not True:
        yield "training.bf16: false; the type is model.torch_dtype, so leave training.bf16 out"


def _loss(found: Translation, given: _Given) -> Iterator[str]:
    low, high = given.take("rlhf.epsilon", None), given.take("rlhf.epsilon_high", None)
    if low is not None:
        found.set("learner.loss.clip_low", low, "rlhf.epsilon")
    if (upper := low if high is None else high) is not None:
        found.set("learner.loss.clip_high", upper, "rlhf.epsilon" if high is None else "rlhf.epsilon_high")
    if given.take("rlhf.kl_in_reward", False) and found.values.get("learner", {}).get("loss", {}).get("kl_coef", 0.04):
        yield "rlhf.kl_in_reward: true, but KL is a term of the loss here; set it to false, or rlhf.beta to 0"
    if given.take("rlhf.async_generate", False):
        found.set("run.max_staleness", 1, "rlhf.async_generate")


def _rewards(found: Translation, given: _Given) -> Iterator[str]:
    functions, weights = given.take("rlhf.reward_funcs", None), given.take("rlhf.reward_weights", None)
    train, heldout = given.take("custom.train_jsonl", None), given.take("custom.val_jsonl", None)
    if not isinstance(functions, list) or not functions:
        yield f"rlhf.reward_funcs: {functions!r} must be a list of import paths, such as my_rewards:accuracy"
        return
    for i, name in enumerate(functions):
        if not isinstance(name, str) or ":" not in name:
            yield f"rlhf.reward_funcs.{i}: {name!r} is no import path; write module:function, as my_rewards:accuracy"
    if weights is not None and (num := len(_listed(weights))) != len(functions):
        yield f"rlhf.reward_weights: {num} numbers for {len(functions)} rlhf.reward_funcs; give one each"
    if not train:
        yield "custom.train_jsonl: required, but missing; name the JSONL file of the training rows"
    args = {"rewards": functions, "weights": weights, "path": train, "heldout_path": heldout}
    used = {name: value for name, value in args.items() if value is not None}
    found.set("environments", [{"task": "trl_rewards", "args": used}], "rlhf.reward_funcs")


def _leave_out(found: Translation, given: _Given) -> None:
    """What is left: keys that change nothing here are told, others refused."""
    for path, value in given.left.items():
        sections = (told for section, told in keys.NEEDLESS_SECTIONS.items() if path.startswith(section))
        why = keys.NEEDLESS.get(path) or next(sections, None)
        if path in keys.REFUSED:
            if value not in (None, False, [], {}):
                found.faults.append(f"{path}: {value!r} {keys.REFUSED[path]}; leave it out")
        elif why is None:
            found.faults.append(f"{path}: unknown key (value {value!r}); no counterpart here, so leave it out")
        else:
            found.notes.append(f"{path}: {value!r} changes nothing: {why}")


def _listed(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def _whole(value: Any) -> int | None:
    """`8080`, `"8080"` and `8080.0`; `None` for what is no whole number, bools too."""
    if isinstance(value, bool):
        return None
    if isinstance(value, str) and value.strip().lstrip("-").isdigit():
        return int(value)
    if isinstance(value, int) or (isinstance(value, float) and value.is_integer()):
        return int(value)
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
