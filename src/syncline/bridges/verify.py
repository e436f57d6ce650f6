"""Does a running engine hold what a checkpoint on disk says? The same digests as a publish, over safetensors files.

A PEFT adapter's folder is proved with its base: the adapter as the engine holds it, scaled, and the base it names.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from syncline.bridges.adapter import A, AdapterLayout, B, LoraLayer, is_adapter_name
from syncline.bridges.receipt import differences, parameter_digests
from syncline.bridges.repacked import is_repacked
from syncline.bridges.saved import saved_tensors, tensors_as_in_memory
from syncline.errors import CheckpointError


def faults_of(folder: Path, served: Mapping[str, str]) -> list[str]:
    """What differs between the checkpoint in `folder` and an engine's `served` parameters (name → `kind:digest`).

    Tensors are cast to the type they are served in, as a load does; what an engine packs again, beside what its loader
    was handed, no checkpoint has. Raises `CheckpointError` for a folder without readable weights.
    """
    served = {name: digest for name, digest in served.items() if not is_repacked(name)}
    if (folder / "adapter_config.json").is_file():
        return _faults_of_adapter(folder, served)
    saved = parameter_digests(_saved_as_served(folder, served))
    return differences(saved, served, left="the checkpoint")


def _faults_of_adapter(folder: Path, served: Mapping[str, str]) -> list[str]:
    adapter = {name: digest for name, digest in served.items() if is_adapter_name(name)}
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        base, _ = Path(config["base_model_name_or_path"] or ""), config["lora_alpha"] / config["r"]
    except (OSError, ValueError, TypeError, KeyError, ZeroDivisionError) as error:
        raise CheckpointError(f"{folder}: adapter_config.json is not what PEFT writes ({error!r})") from error
    if not base.is_dir():
        raise CheckpointError(f"{folder}: its base {str(base)!r} is no folder here; verify a merged checkpoint instead")
    dtype = next((digest.partition("[")[0] for digest in adapter.values()), "float32")
    layers = _saved_layers(folder, config)
    layout = AdapterLayout.of(layers, dtype)
    packed = layout.on(layout.new_buffer(torch.device("cpu")))
    packed.pack(layers)
    faults = differences(packed.digests(), adapter, left="the checkpoint")
    return faults + faults_of(base, {name: digest for name, digest in served.items() if not is_adapter_name(name)})


def _saved_layers(folder: Path, config: Mapping[str, Any]) -> dict[str, LoraLayer]:
    """The pairs of an adapter that has one rank and one alpha for all, by the names of their layers."""
    tensors = {
        name.removeprefix("base_model.model."): t for name, t in saved_tensors(folder, "adapter_model.safetensors")
    }
    if config.get("rank_pattern") or config.get("alpha_pattern") or not all(map(is_adapter_name, tensors)):
        raise CheckpointError(f"{folder}: only LoRA pairs of one rank and alpha can be verified")
    rank = config["r"]
    scaling = config["lora_alpha"] / (rank**0.5 if config.get("use_rslora") else rank)
    names = [name.removesuffix(A) for name in tensors if name.endswith(A)]
    return {name: LoraLayer(tensors[name + A], tensors[name + B], scaling) for name in names}


def _saved_as_served(folder: Path, served: Mapping[str, str]) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in tensors_as_in_memory(folder, served.keys()):
        dtype = served[name].partition("[")[0] if name in served else None
        yield name, tensor.to(getattr(torch, dtype)) if dtype else tensor
