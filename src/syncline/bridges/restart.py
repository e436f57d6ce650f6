"""`restart`: an atomic safetensors checkpoint that the engine reloads in place, or restarts its process from.

Works with every engine, model and quantisation that can load a checkpoint, over any distance a file system spans;
the other bridges are faster. Who waits for whom: `publish` writes the files, the engine is paused (running requests
drain or are aborted), loads them, and answers with the digest of what it then holds; only if that equals the
learner's does it resume. Whatever fails on the way leaves it paused.
"""

import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from syncline.bridges.receipt import differences, model_digest, parameter_digests
from syncline.config.schema import Bridge
from syncline.errors import EngineError, SyncError
from syncline.protocols import EngineControl, Receipt, SyncReport

SHARD_BYTES = 4 << 30
Export = Callable[[Any], Iterable[tuple[str, torch.Tensor]]]


class RestartBridge:
    """See the module. `export(model)` yields the parameters under their checkpoint names, adapters merged;
    `folder` is where versions are written; `assets` is a folder with the config and tokenizer files to copy along."""

    def __init__(self, engine: EngineControl, config: Bridge, *, export: Export, folder: Path, assets: Path) -> None:
        self._engine = engine
        self._config = config
        self._export = export
        self._folder = folder
        self._assets = assets

    def attach(self, model: Any) -> None:
        self._engine.wait_until_ready(timeout_seconds=self._config.timeout_seconds)
        engine = {name: _kind(digest) for name, digest in self._engine.parameters().items()}
        learner = {name: f"{_dtype(t)}{list(t.shape)}" for name, t in self._export(model)}
        if faults := differences(learner, engine):
            raise SyncError(
                f"engine {self._engine.name} serves another model than the learner trains:\n" + "\n".join(faults)
            )

    @contextmanager
    def updating(self) -> Iterator[None]:
        """The engine reads its own copy, so it may go on sampling while the learner's weights change."""
        with self._paused_on_failure():
            yield

    def publish(self, model: Any, *, policy_version: int) -> SyncReport:
        with self._paused_on_failure():
            return self._publish(model, policy_version)

    def _publish(self, model: Any, policy_version: int) -> SyncReport:
        clock = _Stopwatch()
        digests = parameter_digests(self._export(model))
        expected = Receipt(policy_version, model_digest(digests))
        clock.lap("digest")
        served = self._engine.receipt()
        if policy_version < served.policy_version:
            raise SyncError(
                f"policy_version {policy_version} is older than {served.policy_version}, which engine "
                f"{self._engine.name} already serves; versions only grow, so restart the engine to go back"
            )
        path, moved = (None, 0) if served.digest == expected.digest else self._write(model, policy_version)
        clock.lap("write")
        self._engine.pause(mode=self._config.in_flight, timeout_seconds=self._config.timeout_seconds)
        clock.lap("pause")
        held = self._move(path, policy_version)
        if held != expected:
            faults = differences(digests, self._engine.parameters())
            raise SyncError(
                f"engine {self._engine.name} holds version {held.policy_version} digest {held.digest[:12]} after a "
                f"publish of version {policy_version} digest {expected.digest[:12]}:\n" + "\n".join(faults)
            )
        clock.lap("load")
        self._engine.resume()
        clock.lap("resume")
        self._forget_versions_before(policy_version - 1)
        pause = sum(clock.parts[part] for part in ("pause", "load", "resume"))
        return SyncReport(expected, moved, clock.total, pause, dict(clock.parts))

    def close(self) -> None:
        """Nothing is held between publishes."""

    @contextmanager
    def _paused_on_failure(self) -> Iterator[None]:
        """Nothing is sampled from a state nobody proved; an engine that no longer answers samples nothing anyway."""
        try:
            yield
        except BaseException:
            with suppress(EngineError):
                self._engine.pause(mode="abort", timeout_seconds=self._config.timeout_seconds)
            raise

    def _move(self, path: Path | None, policy_version: int) -> Receipt:
        if path is None:
            return self._engine.adopt(policy_version=policy_version)
        load = self._engine.restart if self._config.restart == "process" else self._engine.reload
        return load(str(path), policy_version=policy_version, timeout_seconds=self._config.timeout_seconds)

    def _write(self, model: Any, policy_version: int) -> tuple[Path, int]:
        path = self._folder / f"version-{policy_version:06d}"
        return path, write_weights(self._export(model), path, assets=self._assets)

    def _forget_versions_before(self, policy_version: int) -> None:
        for path in self._folder.glob("version-*"):
            if int(path.name.removeprefix("version-")) < policy_version:
                shutil.rmtree(path)


def write_weights(named: Iterable[tuple[str, torch.Tensor]], path: Path, *, assets: Path) -> int:
    """Writes a loadable model folder: shards, index, and every non-weight file of `assets`. Returns the weights' bytes.

    Written beside and renamed, so `path` is either whole or absent.
    """
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    copy_assets(assets, partial)
    weight_map: dict[str, str] = {}
    total = 0
    for i, shard in enumerate(_shards(named)):
        name = f"model-{i:05d}.safetensors"
        save_file(
            {k: t.detach().contiguous().cpu() for k, t in shard.items()}, partial / name, metadata={"format": "pt"}
        )
        weight_map.update(dict.fromkeys(shard, name))
        total += sum(t.numel() * t.element_size() for t in shard.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (partial / "model.safetensors.index.json").write_text(json.dumps(index))
    shutil.rmtree(path, ignore_errors=True)
    os.replace(partial, path)
    return total


def copy_assets(source: Path, target: Path) -> None:
    """Copies a model folder's files but the weights: config, generation config, tokenizer."""
    for asset in source.iterdir():
        if asset.is_file() and not _holds_weights(asset):
            shutil.copy2(asset, target / asset.name)


def _shards(named: Iterable[tuple[str, torch.Tensor]]) -> Iterator[dict[str, torch.Tensor]]:
    shard: dict[str, torch.Tensor] = {}
    size = 0
    for name, tensor in named:
        shard[name] = tensor
        size += tensor.numel() * tensor.element_size()
        if size >= SHARD_BYTES:
            yield shard
            shard, size = {}, 0
    if shard:
        yield shard


def _holds_weights(path: Path) -> bool:
    return path.suffix in (".safetensors", ".bin", ".pt", ".pth", ".gguf") or path.name.endswith(".index.json")


def _kind(digest: str) -> str:
    return digest.partition(":")[0]


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


class _Stopwatch:
    """Seconds of named parts, one after the other."""

    def __init__(self) -> None:
        self.parts: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, part: str) -> None:
        now = time.perf_counter()
        self.parts[part] = now - self._last
        self._last = now

    @property
    def total(self) -> float:
        return sum(self.parts.values())
