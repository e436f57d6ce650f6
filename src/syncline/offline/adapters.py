"""A PEFT adapter from a folder, over a model: whole, or a message that names the folder.

PEFT raises errors of a dozen kinds for one that does not fit, and only warns where it finds no place for a tensor, or
no tensor for a place.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from syncline.errors import ConfigError

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
MATRICES = ("lora_A.weight", "lora_B.weight")


def adapter_settings(folder: Path, *, field: str) -> Mapping[str, Any]:
    try:
        found = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        if not isinstance(found, Mapping) or not isinstance(found.get("base_model_name_or_path") or "", str):
            raise ValueError("holds no settings by name")
    except (OSError, ValueError) as error:
        raise ConfigError(
            [f"{field}: {folder} is no PEFT adapter ({CONFIG_FILE}: {error}); give its folder"]
        ) from error
    return found


def adapted(model: Any, folder: Path, *, field: str = "adapter", is_trainable: bool = False) -> Any:
    """The model with the adapter of `folder`. Raises `ConfigError` for one that does not load, or not as a whole."""
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import SafetensorError, safe_open

    adapter_settings(folder, field=field)
    if not (folder / WEIGHTS_FILE).is_file():
        raise ConfigError([f"{field}: {folder} has no {WEIGHTS_FILE}; pickled adapters are not loaded, save it again"])
    try:
        with safe_open(folder / WEIGHTS_FILE, framework="pt") as file:
            saved = {name for name in file.keys() if name.endswith(MATRICES)}  # noqa: SIM118  (it is no dict)
        found = PeftModel.from_pretrained(model, str(folder), is_trainable=is_trainable)
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
        told = f"does not load over this model ({type(error).__name__}: {str(error)[:300]})"
        raise ConfigError([f"{field}: {folder} {told}; give one that was trained on it"]) from error
    held = {name for name in get_peft_model_state_dict(found, save_embedding_layers=False) if name.endswith(MATRICES)}
    if odd := [*sorted(saved - held), *sorted(held - saved)]:
        told = f"has {odd[0]}, and the model has no such layer" if odd[0] in saved else f"lacks {odd[0]}"
        raise ConfigError([f"{field}: {folder} {told} ({len(odd)} in all); give one that was trained on it"])
    return found
