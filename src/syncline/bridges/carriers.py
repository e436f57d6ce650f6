"""How an adapter reaches the engines: both ends. The nearest way that each pair of processes has.

One GPU: the engine opens the learner's buffer over CUDA IPC. One host: a memory file of the learner, which every rank
of the engine opens. Otherwise, or if the run asks for it: a PEFT adapter folder, a new one for every version, written
beside and renamed.
Who waits for whom: the learner fills the buffer and waits for its device; only then is the engine asked to read, and
the learner writes again when the engine has answered.
"""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

import torch
from safetensors.torch import load_file, save_file

from syncline.bridges.adapter import A, AdapterLayout
from syncline.bridges.handles import Origin, export_views, new_memory_file, open_views
from syncline.bridges.peft_files import file_name, from_file, to_file
from syncline.bridges.receipt import whole
from syncline.errors import SyncError

_KEPT_VERSIONS = 2
Way = Literal["device", "memory", "files"]


def whereabouts(device: torch.device) -> dict[str, str]:
    """What decides which memory two processes can both open."""
    here = Origin.here(device)
    origin = {field: getattr(here, field) for field in ("boot_id", "device", "torch_version")}
    return origin | {"pid_namespace": os.readlink("/proc/self/ns/pid")}


def way_to(ranks: Sequence[Mapping[str, str]], device: torch.device) -> Way:
    """The nearest way from a buffer on `device` of this process to an engine whose ranks say they are at `ranks`."""
    here = whereabouts(device)
    if any(rank[field] != here[field] for rank in ranks for field in ("boot_id", "pid_namespace", "torch_version")):
        return "files"
    one_device = all(rank["device"] == here["device"] for rank in ranks)
    return "device" if device.type == "cuda" and one_device else "memory"


# The learner's end


class Carrier:
    """The learner's buffer, and what tells each engine where to read it: one way an engine."""

    def __init__(self, layout: AdapterLayout, ways: list[Way], *, device: torch.device, folder: Path) -> None:
        self.layout = layout
        self._folder = folder
        self._file: tuple[str, torch.Tensor] | None = None
        if "memory" in ways:
            path, storage = new_memory_file(layout.buffer_words * 8)
            self._file = (path, torch.empty(0, dtype=torch.int64).set_(storage))  # pyright: ignore[reportArgumentType]
        on_file = self._file is not None and device.type == "cpu"
        self.buffer = self._file[1] if on_file and self._file else layout.new_buffer(device)
        self.packed = layout.on(self.buffer)
        self._sources = [self._source(way) for way in ways]

    def send(self, policy_version: int) -> list[dict[str, Any]]:
        """Makes the buffer readable for every engine; where, in the engines' order."""
        if self._file is not None and self._file[1] is not self.buffer:
            self._file[1].copy_(self.buffer)
        folder = {"folder": str(self._write(policy_version))} if None in self._sources else {}
        return [source or folder for source in self._sources]

    def close(self) -> None:
        """An engine that has opened the memory keeps it until it opens another."""
        if self._file is not None:
            os.close(int(self._file[0].rsplit("/", 1)[-1]))
            self._file = None

    def _source(self, way: Way) -> dict[str, Any] | None:
        """`None`: a folder, another for every version. The nonce tells memory from other memory of the same address."""
        if way == "files":
            return None
        if way == "memory" and self._file is not None:
            path, buffer = self._file
            exported = export_views([("adapter", whole(buffer))], memory_file=(path, self.layout.buffer_words * 8))
        else:
            exported = export_views([("adapter", whole(self.buffer))], memory_file=None)
        return {"memory": exported, "nonce": uuid4().hex}

    def _write(self, policy_version: int) -> Path:
        path = (self._folder / f"adapter-{policy_version:06d}").absolute()
        write_adapter(self.layout, self.buffer, path)
        for old in self._folder.glob("adapter-*"):
            version = old.name.removeprefix("adapter-")
            if version.isdigit() and int(version) <= policy_version - _KEPT_VERSIONS:
                shutil.rmtree(old)
        return path


def write_adapter(layout: AdapterLayout, buffer: torch.Tensor, path: Path) -> None:
    """A folder PEFT and vLLM load as it is. B holds its scaling, so the adapter's alpha is its rank, layer by layer."""
    ranks = {name: layout.shapes[name + A][-2] for name in layout.modules()}
    experts = {name for name in ranks if len(layout.shapes[name + A]) > 2}
    rank = max(ranks.values())
    others = {name: other for name, other in ranks.items() if other != rank}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted({name.rsplit(".", 1)[-1] for name in ranks if name not in experts}),
        "target_parameters": sorted({".".join(name.split(".")[-3:]) for name in experts}) or None,
        "bias": "none",
        "inference_mode": True,
    }
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    views = layout.views(buffer).items()
    tensors = {file_name(name, view.dim()): to_file(name, view).cpu().clone() for name, view in views}
    save_file(tensors, partial / "adapter_model.safetensors", metadata={"format": "pt"})
    (partial / "adapter_config.json").write_text(json.dumps(config))
    shutil.rmtree(path, ignore_errors=True)
    os.replace(partial, path)


# The engine's end


class Receiver:
    """Opens what a `Carrier` sent. Memory stays open until another is sent: opening it costs more than reading it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._source: Mapping[str, Any] | None = None
        self._opened: torch.Tensor | None = None
        self._views: tuple[AdapterLayout, dict[str, torch.Tensor]] | None = None
        """Of the memory that is open, where the engine reads it as it lies."""

    def receive(self, source: Mapping[str, Any], layout: AdapterLayout) -> dict[str, torch.Tensor]:
        """The adapter's tensors on the engine's device. Raises `SyncError` when they cannot be read or are of another
        layout."""
        if "folder" in source:
            return layout.views(self._read(Path(source["folder"]), layout).to(self._device))
        if source != self._source or self._opened is None:
            self._opened, self._source, self._views = None, None, None
            memory = source["memory"]
            device = torch.device("cpu") if memory["origin"]["device"] == "cpu" else self._device
            self._opened = open_views(memory, device=device)["adapter"].tensor
            self._source = source
        if self._opened.numel() != layout.buffer_words:
            raise SyncError(f"the adapter's buffer has {self._opened.numel()} words, its layout {layout.buffer_words}")
        buffer = self._opened.to(self._device)
        if buffer is not self._opened:
            return layout.views(buffer)
        if self._views is None or self._views[0] is not layout:
            self._views = (layout, layout.views(buffer))
        return self._views[1]

    @staticmethod
    def _read(folder: Path, layout: AdapterLayout) -> torch.Tensor:
        try:
            tensors = load_file(folder / "adapter_model.safetensors")
        except OSError as error:
            raise SyncError(f"{folder} cannot be read by the engine: {error}; put run.dir on a shared disk") from error
        buffer = layout.new_buffer(torch.device("cpu"))
        for name, view in layout.views(buffer).items():
            tensor = tensors.get(file_name(name, view.dim()))
            tensor = None if tensor is None else from_file(name, tensor, view.shape)
            if tensor is None or tensor.shape != view.shape or tensor.dtype != view.dtype:
                raise SyncError(f"{folder}: {name} is missing or of another shape or type")
            view.copy_(tensor)
        return buffer
