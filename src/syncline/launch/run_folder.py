"""The run's folder: claimed by one supervisor at a time, and never overwritten or continued by accident.

The claim is a lock on a file in it, which also marks the folder as ours. The supervisor's guardian inherits the lock,
so a folder whose last run was killed is free only when nothing of that run is alive.
"""

import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import yaml

from syncline.config import RunConfig, load
from syncline.errors import ConfigError
from syncline.observe.files import CONFIG_FILE, write_atomically

LOCK_FILE = ".syncline-run"
LOCK_SECONDS = 20.0
"""How long the remains of a killed run may take to end."""
MAY_CHANGE = (
    "run.dir",
    "run.num_steps",
    "engine.host",
    "engine.port",
    "engine.devices",
    "engine.tensor_parallel_size",
    "engine.num_replicas",
    "engine.servers",
    "engine.max_restarts",
    "engine.num_threads",
    "engine.gpu_memory_utilization",
    "engine.kv_cache_bytes",
    "engine.start_timeout_seconds",
    "engine.request_timeout_seconds",
    "trajectory",
    "learner.devices",
    "learner.data_parallel_size",
    "learner.num_threads",
    "learner.checkpoint_interval",
    "learner.num_checkpoints",
    "bridge.host",
    "bridge.min_engines",
    "bridge.timeout_seconds",
    "parity.interval",
    "observe",
)
"""Fields, or whole sections, that a resumed run may change: how long and on what it runs, not what it learns."""


@dataclass(frozen=True, slots=True)
class RunFolder:
    path: Path
    lock_fd: int


@contextmanager
def claim(
    config: RunConfig, *, resume: bool, overwrite: bool, clock: Callable[[], float] = time.monotonic
) -> Iterator[RunFolder]:
    """Locks the run's folder, readies it, writes `config.yaml`. Raises `ConfigError` rather than touch another run."""
    path = Path(config.run.dir)
    if path.exists() and not path.is_dir():
        raise ConfigError([f"run.dir: {config.run.dir!r} is a file; name a folder"])
    if not resume:
        _check_free(path, overwrite=overwrite)
    elif not (path / CONFIG_FILE).exists():
        raise ConfigError([f"run.dir: '{path}' holds no run to resume; leave out --resume"])
    path.mkdir(parents=True, exist_ok=True)
    with (path / LOCK_FILE).open("a+") as lock:
        _lock(lock, path, clock)
        if resume:
            _check_same(config, path)
        else:
            _empty(path)
        write_atomically(path / CONFIG_FILE, config_text(config))
        yield RunFolder(path, lock.fileno())


@contextmanager
def servers_folder(config: RunConfig, path: Path) -> Iterator[Path]:
    """The folder of engines that are started without their run: locked while they live, with `config.yaml`."""
    path.mkdir(parents=True, exist_ok=True)
    with (path / LOCK_FILE).open("a+") as lock:
        _lock(lock, path, time.monotonic)
        write_atomically(path / CONFIG_FILE, config_text(config))
        yield path


def config_text(config: RunConfig) -> str:
    """The resolved configuration as YAML that loads to an equal one."""
    return yaml.dump(config.model_dump(), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def changed_fields(old: Any, new: Any, *, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Dotted field → (old, new), down to the level where either is no section; a missing field is `None`."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return {} if old == new else {prefix: (old, new)}
    return {
        field: change
        for key in [*old, *(key for key in new if key not in old)]
        for field, change in changed_fields(
            old.get(key), new.get(key), prefix=f"{prefix}.{key}" if prefix else str(key)
        ).items()
    }


def _check_free(path: Path, *, overwrite: bool) -> None:
    if not path.exists() or not any(path.iterdir()):
        return
    if not (path / LOCK_FILE).exists():
        raise ConfigError([f"run.dir: '{path}' holds files that no run wrote; name another, or empty it yourself"])
    if not overwrite:
        remedy = "go on with --resume, start over with --overwrite, or name another"
        raise ConfigError([f"run.dir: '{path}' holds a run already; {remedy}"])
    if Path.cwd().is_relative_to(path.resolve()):
        raise ConfigError([f"run.dir: '{path}' holds the current directory, so it cannot be emptied; name another"])


def _check_same(config: RunConfig, path: Path) -> None:
    changes = changed_fields(load(path / CONFIG_FILE).model_dump(mode="json"), config.model_dump(mode="json"))
    faults = [
        f"{field}: {new!r} differs from {old!r}, which the run was started with; set it back, or start a new run.dir"
        for field, (old, new) in changes.items()
        if not any(field == free or field.startswith(free + ".") for free in MAY_CHANGE)
    ]
    if faults:
        raise ConfigError([*faults, f"(a resumed run may change only {', '.join(MAY_CHANGE)})"])


def _empty(path: Path) -> None:
    for entry in path.iterdir():
        if entry.name == LOCK_FILE:
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _lock(lock: IO[str], path: Path, clock: Callable[[], float]) -> None:
    """Waits only where the holder is dead and its guardian is clearing up."""
    deadline = clock() + LOCK_SECONDS
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            lock.seek(0)
            holder = lock.read().strip()
            if (holder and _is_alive(int(holder))) or clock() > deadline:
                raise ConfigError(
                    [f"run.dir: '{path}' is in use by the run of pid {holder}; wait for it, stop it, or name another"]
                ) from None
            time.sleep(0.1)
    lock.seek(0)
    lock.truncate()
    lock.write(str(os.getpid()))
    lock.flush()


def _is_alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


class _Dumper(yaml.SafeDumper):
    """Quotes text that reads as a number, such as `1e-6`, which plain YAML would leave bare."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    try:
        float(text)
    except ValueError:
        return dumper.represent_str(text)
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="'")


_Dumper.add_representer(str, _represent_text)
