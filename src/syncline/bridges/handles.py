"""Both ends of shared memory: the engine exports where its parameters lie, the learner opens the same bytes.

Each rank of an engine exports its own pieces. A piece becomes a storage (a CUDA IPC handle, or a memory file of the
engine's worker on a CPU), a place in it, and a place in the whole parameter. Handles say whose they are (process, its
start, boot, device, versions, model); opening anybody else's is refused, because the bytes behind a recycled pid or
another GPU would be somebody else's.
"""

import base64
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from syncline.bridges.manifest import Shard
from syncline.bridges.receipt import differences, kind_of, model_digest
from syncline.errors import SyncError

ALIGNMENT = 64
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_MUST_EQUAL = {
    "boot_id": "engine and learner must run on one host, since its last boot",
    "device": "give engine.devices and learner.devices the same GPU",
    "torch_version": "engine and learner need the same torch",
    "vllm_version": "install the same vLLM for both, and start the engine again",
    "model": "give both the same model.path; the parameters' names, types or shapes differ",
}
"""Field of an `Origin` → what to do where two differ."""
_START_AGAIN = "start the engine again, and the learner after it"
_CUDA_FIELDS = (
    "size", "stride", "offset", "device", "handle", "storage_size_bytes", "storage_offset_bytes", "requires_grad",
    "ref_counter_handle", "ref_counter_offset", "event_handle", "event_sync_required",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Origin:
    """Whose memory it is."""

    pid: int
    started: int
    """Clock ticks from the boot to the process's start: another process may get the pid, but not both."""
    boot_id: str
    device: str
    """`"cpu"`, or the UUID of the GPU."""
    torch_version: str
    vllm_version: str
    """Empty for memory of a learner."""
    model: str
    """`fingerprint` of what is exported."""

    @classmethod
    def here(cls, device: torch.device, *, vllm_version: str = "", model: str = "") -> "Origin":
        pid, boot_id = os.getpid(), _BOOT_ID.read_text().strip()
        started = process_start(pid)
        assert started is not None
        return cls(pid, started, boot_id, device_name(device), str(torch.__version__), vllm_version, model)


def process_start(pid: int) -> int | None:
    """When the process started, in clock ticks since the boot; `None` when there is none, or only its corpse."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].decode().split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def fingerprint(kinds: Mapping[str, str]) -> str:
    """A model by its parameters' names, types and whole shapes, whatever their values; `kinds` may carry digests."""
    return model_digest({name: kind.partition(":")[0] for name, kind in kinds.items()})


def fingerprint_of(shards: Mapping[str, Shard]) -> str:
    return fingerprint({name: kind_of(shard.tensor, shard.shape) for name, shard in shards.items()})


def device_name(device: torch.device) -> str:
    if device.type == "cpu":
        return "cpu"
    return str(torch.cuda.get_device_properties(device).uuid)


# The engine's end


def move_to_memory_file(parameters: Iterable[torch.nn.Parameter]) -> tuple[str, int]:
    """Moves CPU parameters, in place, into one memory file of this process. Returns its path and size in bytes.

    The file lives as long as this process, and nobody has to delete it.
    """
    parameters = list(parameters)
    offsets, total = [], 0
    for parameter in parameters:
        offsets.append(total)
        size = parameter.numel() * parameter.element_size()
        total += -(-size // ALIGNMENT) * ALIGNMENT
    path, storage = new_memory_file(total)
    for parameter, offset in zip(parameters, offsets, strict=True):
        view = _view(storage, parameter.dtype, offset // parameter.element_size(), parameter.shape, None)
        view.copy_(parameter.data)
        parameter.data = view
    return path, total


def new_memory_file(num_bytes: int) -> tuple[str, torch.UntypedStorage]:
    """A memory file of this process, zeros: the path others of this host map it by, and this process's mapping."""
    descriptor = os.memfd_create("syncline-weights")
    os.ftruncate(descriptor, num_bytes)
    path = f"/proc/{os.getpid()}/fd/{descriptor}"
    return path, _map(path, num_bytes)


def export_views(
    named: Iterable[tuple[str, Shard]], *, memory_file: tuple[str, int] | None, vllm_version: str = ""
) -> dict[str, Any]:
    """Where each piece lies, as plain values: `origin`, `storages`, `tensors`. CPU tensors lie in `memory_file`.

    Raises `SyncError` naming a parameter that this rank holds in several pieces: no one tensor is a view of them.
    """
    handles: list[dict[str, Any]] = []
    places: dict[int, int] = {}
    shards: dict[str, Shard] = {}
    tensors: dict[str, dict[str, Any]] = {}
    device = torch.device("cpu")
    for name, shard in named:
        if name in shards:
            raise SyncError(
                f"{name} is fused in the checkpoint and split over ranks, so one rank holds pieces of it that are not "
                "neighbours; set engine.tensor_parallel_size to 1, or use bridge.name broadcast or restart"
            )
        storage, device = shard.tensor.untyped_storage(), shard.tensor.device
        if storage.data_ptr() not in places:
            places[storage.data_ptr()] = len(handles)
            handles.append(_memory_handle(memory_file) if memory_file else _cuda_handle(storage, device))
        shards[name], tensors[name] = shard, _placed(shard, places[storage.data_ptr()])
    origin = Origin.here(device, vllm_version=vllm_version, model=fingerprint_of(shards))
    return {"origin": asdict(origin), "storages": handles, "tensors": tensors}


def _placed(shard: Shard, storage: int) -> dict[str, Any]:
    return {
        "storage": storage,
        "dtype": str(shard.tensor.dtype).removeprefix("torch."),
        "offset": shard.tensor.storage_offset(),
        "size": list(shard.tensor.shape),
        "stride": list(shard.tensor.stride()),
        "shape": list(shard.shape),
        "start": list(shard.start),
        "counted": shard.counted,
    }


def _memory_handle(memory_file: tuple[str, int]) -> dict[str, Any]:
    return {"path": memory_file[0], "num_bytes": memory_file[1]}


def _cuda_handle(storage: torch.UntypedStorage, device: torch.device) -> dict[str, Any]:
    from torch.multiprocessing.reductions import reduce_tensor

    whole = torch.empty(0, dtype=torch.uint8, device=device).set_(storage)  # pyright: ignore[reportArgumentType]
    _, arguments = reduce_tensor(whole)
    values = [value for value in arguments if not isinstance(value, type | torch.dtype)]
    return {name: _plain(value) for name, value in zip(_CUDA_FIELDS, values, strict=True)}


def _plain(value: Any) -> Any:
    """As JSON and msgpack carry it."""
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    return list(value) if isinstance(value, tuple) else value


# The learner's end


def open_views(
    exported: Mapping[str, Any], *, device: torch.device, model: str | None = None, vllm_version: str | None = None
) -> dict[str, Shard]:
    """One rank's pieces in this process, the same bytes. `model` and `vllm_version`, where given, must be the origin's.

    Raises `SyncError` naming the field: another boot's, device's, torch's, vLLM's or model's, or a process that ended.
    """
    refuse_stranger(Origin(**exported["origin"]), device=device, model=model, vllm_version=vllm_version)
    storages = [_open(handle, device) for handle in exported["storages"]]
    return {name: _opened(storages[place["storage"]], place) for name, place in exported["tensors"].items()}


def _opened(storage: torch.UntypedStorage, place: Mapping[str, Any]) -> Shard:
    tensor = _view(storage, getattr(torch, place["dtype"]), place["offset"], place["size"], place["stride"])
    return Shard(tensor, tuple(place["shape"]), tuple(place["start"]), place["counted"])


def bind(own: Mapping[str, Shard], theirs: Mapping[str, Shard], *, rank: int) -> None:
    """Rebinds each piece of this rank to the memory of the piece of its name.

    Raises `SyncError` naming rank and parameter where one is missing, extra, or another piece.
    """
    if faults := differences(_pieces(own), _pieces(theirs)):
        raise SyncError(
            f"rank {rank}: the weights to share are of another model, or split otherwise:\n" + "\n".join(faults)
        )
    for name, shard in own.items():
        shard.tensor.data = theirs[name].tensor
    torch.cuda.empty_cache()  # of what they were in until now: the engine wants it; nothing without a GPU


def _pieces(shards: Mapping[str, Shard]) -> dict[str, str]:
    """Name → `float32[64, 128] at [64, 0] of [128, 128]`."""
    return {
        name: f"{kind_of(shard.tensor)} at {list(shard.start)} of {list(shard.shape)}" for name, shard in shards.items()
    }


def refuse_stranger(
    origin: Origin, *, device: torch.device, model: str | None = None, vllm_version: str | None = None
) -> None:
    """Raises `SyncError` naming the first field in which the origin is not of this host, device, software and model."""
    here = asdict(Origin.here(device, vllm_version=vllm_version or "", model=model or ""))
    unasked = {field for field, wanted in (("model", model), ("vllm_version", vllm_version)) if wanted is None}
    for field, remedy in _MUST_EQUAL.items():
        theirs = getattr(origin, field)
        if field not in unasked and theirs != here[field]:
            raise SyncError(
                f"the engine's weights cannot be shared: {field} {theirs} is not the learner's {here[field]}; {remedy}"
            )
    started = process_start(origin.pid)
    if started is None:
        raise SyncError(f"the engine's weights cannot be shared: pid {origin.pid} is gone; {_START_AGAIN}")
    if started != origin.started:
        raise SyncError(
            f"the engine's weights cannot be shared: pid {origin.pid} started at {started} is not the process of that "
            f"pid that started at {origin.started}; {_START_AGAIN}"
        )


def _open(handle: Mapping[str, Any], device: torch.device) -> torch.UntypedStorage:
    if "path" in handle:
        return _map(handle["path"], handle["num_bytes"])
    from torch.multiprocessing.reductions import rebuild_cuda_tensor

    values = dict(handle)
    for field in ("handle", "ref_counter_handle", "event_handle"):
        values[field] = base64.b64decode(values[field])
    values["device"] = device.index if device.index is not None else torch.cuda.current_device()
    ordered = [values[field] for field in _CUDA_FIELDS]
    arguments = [torch.Tensor, *ordered[:3], torch.UntypedStorage, torch.uint8, *ordered[3:]]
    whole: torch.Tensor = rebuild_cuda_tensor(*arguments)
    return whole.untyped_storage()


def _map(path: str, num_bytes: int) -> Any:
    return torch.UntypedStorage.from_file(path, shared=True, nbytes=num_bytes)


def _view(
    storage: torch.UntypedStorage, dtype: torch.dtype, offset: int, shape: Iterable[int], stride: Iterable[int] | None
) -> torch.Tensor:
    empty: Any = torch.empty(0, dtype=dtype, device=storage.device)
    place = (storage, offset, torch.Size(shape))
    return empty.set_(*place) if stride is None else empty.set_(*place, tuple(stride))
