"""`vllm_bridge_config.json`: how a learner that is started apart finds an engine that shares its weights.

The engine writes it (`syncline serve --bridge-config`), whole or not at all, for this user alone: where the engine
answers, and the handles of every rank (`bridges.handles`). The learner (`syncline train --bridge-config`) looks for it
in the order that the Atropos example trainer documents, and takes the first there is. What it finds may be of an engine
that ended, of another boot, model or version, or of somebody else: then it is refused, by path and field, and not
skipped, because whatever lies further down the order is older still.
"""

import json
import logging
import math
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from syncline.bridges.handles import Origin, refuse_stranger
from syncline.errors import SyncError

log = logging.getLogger(__name__)
FILE_NAME = "vllm_bridge_config.json"
POLL_SECONDS = 0.5
AUTO = "auto"
"""In place of a path: where the documented order leads."""
FALLBACK_FOLDER = Path("/tmp/atropos_bridge")


@dataclass(frozen=True, slots=True)
class BridgeFile:
    """What the file says, and where it was found."""

    path: Path
    url: str
    """Of the engine."""
    model: str
    """As the engine was told, `model.path`."""
    handles: Sequence[Mapping[str, Any]]
    """One export a rank."""

    def origin(self, rank: int) -> Origin:
        return Origin(**self.handles[min(rank, len(self.handles) - 1)]["origin"])

    def refusal(self, field: str, told: object, other: object, remedy: str) -> SyncError:
        return SyncError(f"{self.path}: {field} {told} is not {other}; {remedy}")


def search_order(explicit: str) -> list[Path]:
    """The explicit path alone, where one is given; else `$LOGDIR`, the working folder, and the fallback."""
    if explicit != AUTO:
        path = Path(explicit)
        return [path / FILE_NAME if path.is_dir() else path]
    logdir = os.environ.get("LOGDIR")
    folders = [*([Path(logdir)] if logdir else []), Path(), FALLBACK_FOLDER]
    return [folder / FILE_NAME for folder in folders]


def write_bridge_file(explicit: str, *, url: str, model: str, handles: Sequence[Mapping[str, Any]]) -> Path:
    """Writes it where the search begins, in place of any earlier one. Returns its path; raises `SyncError`."""
    path = search_order(explicit)[0].absolute()
    tensors = handles[0]["tensors"]
    device = Origin(**handles[0]["origin"]).device
    content = {
        "model": model,
        "url": url,
        "tp_degree": len(handles),
        "dp_shard_degree": 1,
        "param_names": sorted(tensors),
        "param_mappings": {
            name: {"shape": place["shape"], "dtype": f"torch.{place['dtype']}", "device": device}
            for name, place in tensors.items()
        },
        "num_params": len(tensors),
        "shared_weights_enabled": True,
        "single_copy_enabled": True,
        "ipc_handles": list(handles),
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, beside = tempfile.mkstemp(dir=path.parent, prefix=f".{FILE_NAME}.")  # mode 0600
        with os.fdopen(descriptor, "w") as file:
            json.dump(content, file)
        os.replace(beside, path)
    except OSError as error:
        raise SyncError(f"{path}: cannot be written: {error}; set LOGDIR, or give --bridge-config a path") from error
    return path


def find_bridge_file(
    explicit: str,
    *,
    model: str,
    device: torch.device,
    rank: int = 0,
    patience_seconds: float = 0.0,
    sleep: Callable[[float], None] = time.sleep,
) -> BridgeFile:
    """The first of `search_order`. Raises `SyncError` when none came for `patience_seconds`, or it is
    not of an engine that shares this `model` (the learner's `model.path`) now, on this host, with the device and torch
    of this rank of the learner."""
    searched = search_order(explicit)
    path = _first_there(searched)
    told = "\n".join(f"  {path.absolute()}" for path in searched)
    if path is None and patience_seconds:
        log.warning("no %s yet; waiting %g s for an engine that shares weights:\n%s", FILE_NAME, patience_seconds, told)
    for _ in range(math.ceil(patience_seconds / POLL_SECONDS)):
        if path is not None:
            break
        sleep(POLL_SECONDS)
        path = _first_there(searched)
    if path is None:
        raise SyncError(
            f"no {FILE_NAME}; looked for\n{told}\nstart the engine with bridge.name = shared and --bridge-config "
            "(vllm_api_server.py: VLLM_ENABLE_SHARED_WEIGHTS=1), LOGDIR alike for both, or give its path"
        )
    found = _read(path)
    if found.model != model:
        raise found.refusal("model", found.model, f"the learner's {model}", "set model.path alike for both")
    try:
        refuse_stranger(found.origin(rank), device=device)
    except SyncError as error:
        raise SyncError(f"{path}: {error}") from error
    return found


def _first_there(searched: Sequence[Path]) -> Path | None:
    return next((path.absolute() for path in searched if path.exists()), None)


def _read(path: Path) -> BridgeFile:
    """Raises `SyncError` for a file of another user, which could name any memory, or of another shape."""
    if path.stat().st_uid != os.geteuid():
        raise SyncError(f"{path}: its owner: user {path.stat().st_uid} is not this one ({os.geteuid()}); remove it")
    try:
        content = json.loads(path.read_text())
        found = BridgeFile(path, content["url"], content["model"], content["ipc_handles"])
        for rank in range(max(1, len(found.handles))):
            found.origin(rank)
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise SyncError(
            f"{path}: is not what `syncline serve --bridge-config` writes ({type(error).__name__}: {error}); remove "
            "it, and start the engine again"
        ) from error
    return found
