"""What a GRPO file of ms-swift says, by dotted path: its defaults filled in, its shorthand for batches written out."""

from collections.abc import Iterator, Mapping
from typing import Any

from syncline.config import ms_swift_keys as keys

SERVER = "custom.extra.rollout_server"
MISSING = object()


class Given:
    """The file's values by dotted path; each is taken once."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.left = values

    def take(self, path: str, default: Any = MISSING) -> Any:
        return self.left.pop(path, default)


def read(values: Mapping[str, Any], notes: list[str]) -> Given:
    """With ms-swift's defaults under what the file says; `notes` gets where ours count instead."""
    flat = _flat(values)
    is_apart = flat.get("rlhf.vllm_mode") == "server"
    defaults: dict[str, Any] = {f"{SERVER}.vllm_gpu_memory_utilization": keys.SERVER_MEMORY} if is_apart else {}
    if rate := keys.LEARNING_RATES.get(str(flat.get("tuner.train_type", "lora"))):
        defaults["training.learning_rate"] = rate
    said = {*flat, "rlhf.vllm_gpu_memory_utilization"} if is_apart else {*flat}
    if said & {"rlhf.vllm_max_model_len", f"{SERVER}.vllm_max_model_len"}:
        said.add("global_max_length")
    notes += [f"{path}: absent: {why}" for path, why in keys.KEPT.items() if path not in said]
    return Given(keys.DEFAULTS | defaults | flat)


def batch_plan(given: Given) -> Iterator[str]:
    """Writes out `custom.grpo.batch_plan`, as if the file said what it is short for."""
    section = "custom.grpo.batch_plan"
    is_on = given.take(f"{section}.enabled", False) is True
    for name, paths in keys.BATCH_PLAN.items():
        if (value := given.take(f"{section}.{name}")) is MISSING:
            continue
        if not is_on:
            yield f"{section}.{name}: {value!r}, but {section}.enabled is not true; set it, or leave the plan out"
            continue
        for path in paths:
            if (said := given.left.setdefault(path, value)) != value:
                yield f"{section}.{name}: {value!r} is not {path} = {said!r}; leave one of them out"


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted path → value. Mappings that are values themselves stay whole; null and {} say nothing and are left out."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        path = f"{prefix}.{name}" if prefix else str(name)
        if isinstance(value, dict) and value and path not in keys.WHOLE:
            flat |= _flat(value, path)
        elif value not in (None, {}):
            flat[path] = value
    return flat
