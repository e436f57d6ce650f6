"""Does a running engine hold what a checkpoint on disk says? The same digests as a publish, over safetensors files."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from syncline.bridges.receipt import differences, parameter_digests
from syncline.errors import CheckpointError


def faults_of(folder: Path, served: Mapping[str, str]) -> list[str]:
    """What differs between the checkpoint in `folder` and an engine's `served` parameters (name → `kind:digest`).

    Tensors are cast to the type they are served in, as a load does. Raises `CheckpointError` for a folder without
    readable weights.
    """
    saved = parameter_digests(_saved_as_served(folder, served))
    return differences(saved, served, left="the checkpoint")


def _saved_as_served(folder: Path, served: Mapping[str, str]) -> Iterator[tuple[str, torch.Tensor]]:
    tied = _ties_embeddings(folder)
    for name, tensor in _saved(folder):
        if name == "lm_head.weight" and name not in served and tied:
            continue
        dtype = served[name].partition("[")[0] if name in served else None
        yield name, tensor.to(getattr(torch, dtype)) if dtype else tensor


def _saved(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise CheckpointError(f"{folder}: holds no *.safetensors; give the folder of a checkpoint")
    for path in paths:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118  (not a dict: it cannot be iterated)
                    yield name, file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: cannot be read: {error}") from error


def _ties_embeddings(folder: Path) -> bool:
    config = folder / "config.json"
    return config.is_file() and bool(json.loads(config.read_text()).get("tie_word_embeddings"))
