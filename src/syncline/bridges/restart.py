"""`restart`: an atomic safetensors checkpoint that the engine reloads in place, or restarts its process from.

Works with every engine, model and quantisation that can load a checkpoint, over any distance a file system spans;
the other bridges are faster. Who waits for whom: `publish` writes the files, the engine is paused (running requests
drain or are aborted), loads them, and answers with the digest of what it then holds; only if that equals the
learner's does it resume. Whatever fails on the way leaves it paused.
"""

import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from syncline.bridges.copies import CopyingBridge
from syncline.bridges.fleet import Fleet, refuse_other_model
from syncline.bridges.ranks import ONE_RANK, Ranks
from syncline.bridges.receipt import kind_of, model_digest, parameter_digests
from syncline.bridges.stopwatch import Stopwatch
from syncline.config.schema import Bridge
from syncline.protocols import EngineControl, Receipt, SyncReport

SHARD_BYTES = 4 << 30
PARTIAL = ".partial"
Export = Callable[[Any], Iterable[tuple[str, torch.Tensor]]]


class RestartBridge(CopyingBridge):
    """See the module. `export(model)` yields the parameters under their own names, adapters merged, and `saved(model)`
    as files name and cut them (by default alike); `folder` is where versions are written; `assets` is a folder with the
    config and tokenizer files to copy along. With several ranks both yield wholes on each of them, together; rank 0
    writes."""

    def __init__(
        self,
        engines: Sequence[EngineControl],
        config: Bridge,
        *,
        export: Export,
        saved: Export | None = None,
        folder: Path,
        assets: Path,
        ranks: Ranks = ONE_RANK,
    ) -> None:
        self._fleet = Fleet(engines, config, ranks=ranks)
        self._ranks = ranks
        self._config = config
        self._export = export
        self._saved = saved or export
        self._folder = folder
        self._assets = assets
        self._kinds: dict[str, str] = {}

    def attach(self, model: Any) -> None:
        self._fleet.wait_until_ready()
        self._kinds = {name: kind_of(tensor) for name, tensor in self._export(model)}
        self._fleet.refuse_other_model(self._kinds)

    def _admit(self, engine: EngineControl) -> None:
        refuse_other_model(engine, self._kinds)

    def _publish(self, model: Any, policy_version: int) -> SyncReport:
        clock = Stopwatch()
        digests = parameter_digests(self._export(model), finite=True)
        expected = Receipt(policy_version, model_digest(digests))
        clock.lap("digest")
        served = self._fleet.receipts()
        self._fleet.refuse_backwards(policy_version, served)
        unchanged = all(receipt.digest == expected.digest for receipt in served)
        path, moved = (None, 0) if unchanged else self._write(model, policy_version)
        clock.lap("write")
        self._fleet.pause()
        clock.lap("pause")
        self._fleet.prove(self._move(path, expected), expected, digests=digests)
        clock.lap("load")
        self._fleet.resume(expected)
        clock.lap("resume")
        self._ranks.from_first(lambda: self._forget_versions_before(policy_version - 1))
        pause = sum(clock.parts[part] for part in ("pause", "load", "resume"))
        return SyncReport(expected, moved, clock.total, pause, dict(clock.parts))

    def close(self) -> None:
        """Nothing is held between publishes but the threads."""
        self._fleet.close()

    def _move(self, path: Path | None, expected: Receipt) -> list[Receipt]:
        timeout = self._config.timeout_seconds

        def load(engine: EngineControl) -> Receipt:
            if path is None:
                return engine.adopt(expected)
            if self._config.restart == "process":
                return engine.restart(str(path), policy_version=expected.policy_version, timeout_seconds=timeout)
            return engine.reload(str(path), expected=expected, timeout_seconds=timeout)

        return self._fleet.each(load)

    def _write(self, model: Any, policy_version: int) -> tuple[Path, int]:
        path = self._folder / f"version-{policy_version:06d}"
        named = iter(self._saved(model))

        def write() -> int:
            try:
                return write_weights(named, path, assets=self._assets)
            finally:
                _exhaust(named)

        if not self._ranks.is_first:
            _exhaust(named)
        return path, self._ranks.from_first(write)

    def _forget_versions_before(self, policy_version: int) -> None:
        for path in self._folder.glob("version-*"):
            half_written = path.suffix == PARTIAL  # by a learner that was killed
            if half_written or int(path.name.removeprefix("version-")) < policy_version:
                shutil.rmtree(path)


def _exhaust(named: Iterator[Any]) -> None:
    """To the end, whatever happens: the other ranks give their pieces in step with it."""
    deque(named, maxlen=0)


def write_weights(named: Iterable[tuple[str, torch.Tensor]], path: Path, *, assets: Path) -> int:
    """Writes a loadable model folder: shards, index, and every non-weight file of `assets`. Returns the weights' bytes.

    Written beside and renamed, so `path` is either whole or absent.
    """
    partial = path.with_name(path.name + PARTIAL)
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
