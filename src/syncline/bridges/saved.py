"""A checkpoint folder's tensors, under the names that parameters have in memory: those that engines and digests use.

Files keep a family's first names and cut; transformers fuses experts, and renames some layers, as it loads. So a folder
whose names are those of the memory is read tensor by tensor, and any other of a family with such a table is loaded by
transformers itself.
"""

import functools
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from syncline.config.model_folder import read_settings
from syncline.errors import CheckpointError

WEIGHTS = "model*.safetensors"
"""Not the optimizer's, which lie beside them in a run's checkpoint."""


def saved_tensors(folder: Path, files: str = WEIGHTS) -> Iterator[tuple[str, torch.Tensor]]:
    """As the files name them. Raises `CheckpointError` for a folder without readable weights."""
    paths = sorted(folder.glob(files))
    if not paths:
        raise CheckpointError(f"{folder}: holds no {files}; give the folder of a checkpoint")
    for path in paths:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118  (not a dict: it cannot be iterated)
                    yield name, file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: cannot be read: {error}") from error


def tensors_as_in_memory(folder: Path, names: Collection[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """`names` are those in memory. A head tied to the embedding is left out. Raises `CheckpointError`."""
    config = _config(folder)
    tied = bool(config.get("tie_word_embeddings")) and "lm_head.weight" not in names
    left_out = {"lm_head.weight"} if tied else set()
    kinds = {name: tensor.dtype for name, tensor in saved_tensors(folder) if name not in left_out}
    if kinds.keys() <= set(names) or not _is_converted(config.get("model_type")):
        return ((name, tensor) for name, tensor in saved_tensors(folder) if name not in left_out)
    return _loaded(folder, functools.reduce(torch.promote_types, kinds.values()))


def model_class(config: Any) -> Any:
    """transformers' class for a configuration: one with a vision tower has none among the causal language models."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    return AutoModelForCausalLM if getattr(config, "vision_config", None) is None else AutoModelForImageTextToText


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    return read_settings(path, field="the checkpoint") if path.is_file() else {}


def _is_converted(model_type: str | None) -> bool:
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    return bool(model_type and get_checkpoint_conversion_mapping(model_type))


def _loaded(folder: Path, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    from transformers import AutoConfig

    loading: Any = model_class(AutoConfig.from_pretrained(folder)).from_pretrained
    model, found = loading(folder, dtype=dtype, output_loading_info=True)
    for name, parameter in model.named_parameters():
        if name not in found["missing_keys"]:
            yield name, parameter.detach()
