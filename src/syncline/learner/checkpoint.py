"""Checkpoints: whole or absent, resumable to the bit, and loadable as a Hugging Face model.

A checkpoint is a folder `step-000123` with the weights (or the adapter) in safetensors, `optimizer.safetensors`
(moments and the low 16 bits of split masters), `rng.safetensors` and `state.json`. Weights are named and cut as the
family's files are (`saved_parameters`), whatever transformers makes of them in memory. It is written beside, synced to
disk and renamed, so a folder without `.partial` is complete; the newest is the one to resume from. Tensors are whole in
it, however many ranks trained them: rank 0 writes, and any number of ranks can resume.
"""

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from syncline.bridges.manifest import Shard
from syncline.bridges.ranks import ONE_RANK, Ranks
from syncline.bridges.restart import copy_assets
from syncline.bridges.saved import tensors_as_in_memory
from syncline.errors import CheckpointError
from syncline.learner.model import saved_parameters
from syncline.learner.places import cut, shard, wholes

PREFIX = "step-"


@dataclass(frozen=True, slots=True)
class TrainState:
    """Where a run stands: the last finished step and the policy version it published."""

    step: int = 0
    policy_version: int = 0
    trained_tokens: int = 0

    def next(self, *, trained_tokens: int) -> "TrainState":
        return TrainState(self.step + 1, self.policy_version + 1, self.trained_tokens + trained_tokens)


@dataclass(frozen=True, slots=True)
class Checkpoints:
    """The checkpoints of one run, in `folder`, the newest `num_kept` of them. `assets` is a folder with the config and
    tokenizer files that make each loadable with `from_pretrained`."""

    folder: Path
    num_kept: int
    assets: Path
    ranks: Ranks = ONE_RANK

    def newest(self) -> Path | None:
        paths = self.ranks.from_first(self._complete)
        return paths[-1] if paths else None

    def newest_step(self) -> int:
        """0 when there is no checkpoint."""
        newest = self.newest()
        return int(newest.name.removeprefix(PREFIX)) if newest else 0

    def save(self, state: TrainState, model: nn.Module, optimizer: Any, *, digest: str) -> Path:
        trained, moments = _trained(model), optimizer.state_dict()
        shards = {name: shard(tensor) for name, tensor in trained.items()}
        weights = wholes(shards.items(), self.ranks) if _is_adapted(model) else saved_parameters(model, self.ranks)
        files = {
            _weights_name(model): self._on_cpu(weights),
            "optimizer.safetensors": self._on_cpu(wholes(_shards_of_state(moments, shards).items(), self.ranks)),
            "rng.safetensors": _random_state(),
        }
        path = self.folder / f"{PREFIX}{state.step:06d}"
        self.ranks.from_first(lambda: self._write(path, files, model, json.dumps(asdict(state) | {"digest": digest})))
        return path

    def load(self, path: Path, model: nn.Module, optimizer: Any) -> tuple[TrainState, str]:
        """Restores everything in place; returns the state and the digest the weights must have.

        Raises `CheckpointError` naming what is missing or of another shape.
        """
        try:
            values = json.loads((path / "state.json").read_text())
            digest = values.pop("digest")
            state = TrainState(**values)
            shards = {name: shard(tensor) for name, tensor in _trained(model).items()}
            adapter = load_file(path / _weights_name(model)) if _is_adapted(model) else None
            _restore(model, adapter or dict(tensors_as_in_memory(path, shards.keys())), path)
            own = _shards_of_state(optimizer.state_dict(), shards)
            optimizer.load_state_dict(_cut_like(own, load_file(path / "optimizer.safetensors")))
            _set_random_state(load_file(path / "rng.safetensors"))
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{path}: cannot be resumed from: {error}; remove it to fall back to an older one"
            ) from error
        return state, digest

    def _on_cpu(self, named: Iterable[tuple[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Of rank 0; other ranks give their pieces and keep nothing."""
        return {name: whole.cpu() for name, whole in named if self.ranks.is_first}

    def _write(self, path: Path, files: Mapping[str, Mapping[str, torch.Tensor]], model: Any, state: str) -> None:
        partial = path.with_name(path.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        copy_assets(self.assets, partial)
        for name, tensors in files.items():
            _save(tensors, partial / name)
        for adapter in getattr(model, "peft_config", {}).values():
            adapter.save_pretrained(partial)
        (partial / "state.json").write_text(state)
        _sync_to_disk(partial)
        shutil.rmtree(path, ignore_errors=True)
        os.replace(partial, path)
        _sync_entry(self.folder)
        self._forget_oldest()

    def _forget_oldest(self) -> None:
        for path in self._complete()[: -self.num_kept]:
            shutil.rmtree(path)

    def _complete(self) -> list[Path]:
        """Oldest first; a `.partial` folder is none."""
        return sorted(p for p in self.folder.glob(f"{PREFIX}*") if p.name.removeprefix(PREFIX).isdigit())


def _is_adapted(model: nn.Module) -> bool:
    return hasattr(model, "peft_config")


def _weights_name(model: nn.Module) -> str:
    return "adapter_model.safetensors" if _is_adapted(model) else "model.safetensors"


def _trained(model: nn.Module) -> dict[str, torch.Tensor]:
    """What training changes: the adapter and what trains beside it, or every parameter; tied ones once."""
    if _is_adapted(model):
        from peft import get_peft_model_state_dict

        beside = {name: p for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name}
        return get_peft_model_state_dict(model) | beside
    return dict(model.named_parameters())


def _shards_of_state(state: Mapping[str, torch.Tensor], shards: Mapping[str, Shard]) -> dict[str, Shard]:
    """The optimizer's tensors have their parameters' places; what belongs to no parameter is its own whole."""
    placed: dict[str, Shard] = {}
    for name, tensor in state.items():
        parameter = shards.get(name.rpartition(".")[0])
        placed[name] = replace(parameter, tensor=tensor) if parameter else shard(tensor)
    return placed


def _cut_like(own: Mapping[str, Shard], saved: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """This rank's pieces of what was saved. What has another shape, or no owner, is left for the optimizer to name."""
    fits = {name for name, tensor in saved.items() if name in own and tuple(tensor.shape) == own[name].shape}
    return {name: cut(t, own[name], own[name].tensor.shape) if name in fits else t for name, t in saved.items()}


def _restore(model: nn.Module, saved: Mapping[str, torch.Tensor], path: Path) -> None:
    """In place: a parameter may be a view of memory that another process reads."""
    current = _trained(model)
    if missing := sorted(current.keys() ^ saved.keys()):
        raise ValueError(f"{path.name} and the model differ in {len(missing)} parameters, such as {missing[0]}")
    with torch.no_grad():
        for name, parameter in current.items():
            own = shard(parameter)
            if own.shape != tuple(saved[name].shape) or parameter.dtype != saved[name].dtype:
                raise ValueError(
                    f"{name} is {saved[name].dtype}{list(saved[name].shape)} in the checkpoint "
                    f"and {parameter.dtype}{list(own.shape)} in the model"
                )
            own.tensor.copy_(cut(saved[name], own, own.tensor.shape))


def _save(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    save_file({k: t.detach().contiguous().cpu() for k, t in tensors.items()}, path, metadata={"format": "pt"})


def _random_state() -> dict[str, torch.Tensor]:
    state = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(state: Mapping[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _sync_to_disk(folder: Path) -> None:
    for path in _files(folder):
        with path.open("rb") as file:
            os.fsync(file.fileno())
    _sync_entry(folder)


def _sync_entry(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file())
