"""Checkpoints: whole or absent, resumable to the bit, and loadable as a Hugging Face model.

A checkpoint is a folder such as `step-000123` with the weights (or the adapter) in safetensors, `optimizer.safetensors`
(moments and the low 16 bits of split masters; of several ranks, a file each), `rng.safetensors` and `state.json`.
Weights are named and cut as the family's files are (`saved_parameters`), whatever transformers makes of them in memory.
It is written beside, synced to disk and renamed, so a folder without `.partial` is complete; the newest is the one to
resume from. Weights are whole in it, and of the rest is known which piece of what it is (`pieces.py`): any number of
ranks can resume.
"""

import glob
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from syncline.bridges.manifest import Shard
from syncline.bridges.ranks import ONE_RANK, Ranks
from syncline.bridges.restart import copy_assets
from syncline.bridges.saved import tensors_as_in_memory
from syncline.errors import CheckpointError
from syncline.learner.model import saved_parameters, trainable_parameters
from syncline.learner.pieces import read_pieces, write_pieces
from syncline.learner.places import cut, shard, wholes

NAME = "step-{step:06d}"


@dataclass(frozen=True, slots=True)
class TrainState:
    """Where a run stands: the last finished step and the last policy version it published."""

    step: int = 0
    policy_version: int = 0
    trained_tokens: int = 0

    def next(self, *, trained_tokens: int, publishes: bool = True) -> "TrainState":
        return TrainState(self.step + 1, self.policy_version + publishes, self.trained_tokens + trained_tokens)

    def beyond(self, served: int) -> "TrainState":
        """The same; under a version above `served` where that is a later one."""
        return self if served <= self.policy_version else replace(self, policy_version=served + 1)


@dataclass(frozen=True, slots=True)
class Checkpoints:
    """The checkpoints of one run, in `folder`, the newest `num_kept` of them. `assets` is a folder with the config and
    tokenizer files that make each loadable with `from_pretrained`; `name` is `learner.checkpoint_name`'s last part."""

    folder: Path
    num_kept: int
    assets: Path
    ranks: Ranks = ONE_RANK
    name: str = NAME

    def newest(self) -> Path | None:
        paths = self.ranks.from_first(self._complete)
        return paths[-1] if paths else None

    def newest_step(self) -> int:
        """0 when there is no checkpoint."""
        newest = self.newest()
        return self._step(newest) if newest else 0

    def save(self, state: TrainState, model: nn.Module, optimizer: Any, *, digest: str) -> Path:
        """Raises `CheckpointError` when it cannot be written, as on a full disk: what was written of it is removed, and
        older checkpoints stay."""
        shards = {name: shard(tensor) for name, tensor in _trained(model).items()}
        weights = wholes(shards.items(), self.ranks) if _is_adapted(model) else saved_parameters(model, self.ranks)
        files = {
            _weights_name(model): self._on_cpu(weights),
            "rng.safetensors": _numbered(self.ranks.gathered(_random_state())),
        }
        path = self.folder / self.name.format(step=state.step)
        partial = self.ranks.from_first(lambda: self._new(path.with_name(path.name + ".partial")))
        own = _shards_of_state(optimizer, model)
        told = json.dumps(asdict(state) | {"digest": digest})
        try:
            self.ranks.together(lambda: self._write_own(own, partial))
            self.ranks.from_first(lambda: self._write(path, partial, files, model=model, state=told))
        except CheckpointError:
            if self.ranks.is_first:
                shutil.rmtree(partial, ignore_errors=True)
            raise
        return path

    def load(self, path: Path, model: nn.Module, optimizer: Any) -> tuple[TrainState, str]:
        """Restores everything in place; returns the state and the digest the weights must have.

        Raises `CheckpointError` naming what is missing or of another shape.
        """
        try:
            values = json.loads((path / "state.json").read_text())
            digest = values.pop("digest")
            state = TrainState(**values)
            adapter = load_file(path / _weights_name(model)).items() if _is_adapted(model) else None
            _restore(model, adapter or tensors_as_in_memory(path, _trained(model).keys()), path)
            own = _shards_of_state(optimizer, model)
            optimizer.load_state_dict(read_pieces(own, path, "optimizer"))
            _set_random_state(load_file(path / "rng.safetensors"), self.ranks)
        except (OSError, KeyError, TypeError, ValueError, SafetensorError) as error:
            raise CheckpointError(
                f"{path}: cannot be resumed from: {error}; remove it to fall back to an older one"
            ) from error
        return state, digest

    def _on_cpu(self, named: Iterable[tuple[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Of rank 0; other ranks give their pieces and keep nothing."""
        return {name: whole.cpu() for name, whole in named if self.ranks.is_first}

    def _new(self, partial: Path) -> Path:
        with _writing(partial):
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        return partial

    def _write_own(self, shards: Mapping[str, Shard], partial: Path) -> None:
        if not partial.is_dir():
            raise CheckpointError(f"{partial} is not there for rank {self.ranks.rank}; all hosts must share run.dir")
        with _writing(partial):
            _sync_to_disk(write_pieces(shards, partial, "optimizer", self.ranks))

    def _write(
        self, path: Path, partial: Path, files: Mapping[str, Mapping[str, torch.Tensor]], *, model: Any, state: str
    ) -> None:
        with _writing(partial):
            copy_assets(self.assets, partial)
            for name, tensors in files.items():
                _save(tensors, partial / name)
            for adapter in getattr(model, "peft_config", {}).values():
                adapter.save_pretrained(partial)
            (partial / "state.json").write_text(state)
            for file in _files(partial):
                _sync_to_disk(file)
            _sync_entry(partial)
            shutil.rmtree(path, ignore_errors=True)
            os.replace(partial, path)
            _sync_entry(self.folder)
        self._forget_oldest()

    def _forget_oldest(self) -> None:
        for path in self._complete()[: -self.num_kept]:
            shutil.rmtree(path)

    def _complete(self) -> list[Path]:
        """Oldest first; a `.partial` folder is none."""
        prefix = self.name.partition("{")[0]
        named = (p for p in self.folder.glob(f"{glob.escape(prefix)}*") if p.name[len(prefix) :].isdigit())
        return sorted(named, key=self._step)

    def _step(self, path: Path) -> int:
        return int(path.name.removeprefix(self.name.partition("{")[0]))


@contextmanager
def _writing(partial: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{partial}: cannot be written: {error}; make room, then go on with --resume") from error


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


def _shards_of_state(optimizer: Any, model: nn.Module) -> dict[str, Shard]:
    """The optimizer's tensors have their parameters' places; what belongs to no parameter is its own whole."""
    shards = {name: shard(parameter) for name, parameter in trainable_parameters(model)}
    placed: dict[str, Shard] = {}
    for name, tensor in optimizer.state_dict().items():
        parameter = shards.get(name.rpartition(".")[0])
        placed[name] = _beside(parameter, tensor) if parameter else shard(tensor)
    return placed


def _beside(parameter: Shard, tensor: torch.Tensor) -> Shard:
    """What has an element for each of the parameter's, or (scales of 8-bit moments) some for each of its rows."""
    if tensor.shape == parameter.tensor.shape:
        return replace(parameter, tensor=tensor)
    others = tuple(tensor.shape[1:])
    return replace(
        parameter, tensor=tensor, shape=(parameter.shape[0], *others), start=(parameter.start[0], *(0 for _ in others))
    )


def _restore(model: nn.Module, saved: Iterable[tuple[str, torch.Tensor]], path: Path) -> None:
    """In place: a parameter may be a view of memory that another process reads."""
    current, seen = _trained(model), set[str]()
    with torch.no_grad():
        for name, tensor in saved:
            seen.add(name)
            if name not in current:
                continue
            own = shard(current[name])
            if own.shape != tuple(tensor.shape) or own.tensor.dtype != tensor.dtype:
                raise ValueError(
                    f"{name} is {tensor.dtype}{list(tensor.shape)} in the checkpoint "
                    f"and {own.tensor.dtype}{list(own.shape)} in the model"
                )
            own.tensor.copy_(cut(tensor, own, own.tensor.shape))
    if missing := sorted(current.keys() ^ seen):
        raise ValueError(f"{path.name} and the model differ in {len(missing)} parameters, such as {missing[0]}")


def _save(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    save_file({k: t.detach().contiguous().cpu() for k, t in tensors.items()}, path, metadata={"format": "pt"})


def _random_state() -> dict[str, torch.Tensor]:
    state = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _numbered(states: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Every rank's: `torch` is the first's, `torch.1` the second's."""
    return {f"{kind}.{i}" if i else kind: value for i, state in enumerate(states) for kind, value in state.items()}


def _set_random_state(saved: Mapping[str, torch.Tensor], ranks: Ranks) -> None:
    """This rank's own; where other ranks had saved, one that follows from the first's."""
    num_saved = sum(name.partition(".")[0] == "torch" for name in saved)
    suffix = f".{ranks.rank}" if ranks.rank and num_saved == ranks.world_size else ""
    torch.set_rng_state(saved[f"torch{suffix}"])
    if f"cuda{suffix}" in saved and torch.cuda.is_available():
        torch.cuda.set_rng_state(saved[f"cuda{suffix}"])
    if ranks.split_data and num_saved != ranks.world_size:
        torch.manual_seed(int(torch.randint(1 << 62, ())) + ranks.rank)


def _sync_to_disk(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _sync_entry(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file())
