"""Which weights a run's engines hold, for verbs that name their results by them."""

import logging
from collections.abc import Sequence
from pathlib import Path

from syncline.config import RunConfig
from syncline.errors import EngineError, SyncError
from syncline.protocols import Receipt

log = logging.getLogger("syncline.evaluate")


def held_by(config: RunConfig, engine_urls: Sequence[str]) -> tuple[Receipt, list[str]]:
    """What the engines hold, and which of them: those of the newest version, if they are as many as the run needs.

    Raises `SyncError` when others of them hold something else, and what does not answer where every one is needed.
    """
    from syncline.engines.client import EngineController

    least = min(config.bridge.min_engines or len(engine_urls), len(engine_urls))
    receipts: dict[str, Receipt] = {}
    for url in engine_urls:
        engine = EngineController(url, timeout_seconds=config.engine.start_timeout_seconds)
        try:
            engine.wait_until_ready(timeout_seconds=config.engine.start_timeout_seconds)
            receipts[url] = engine.receipt()
        except EngineError as fault:
            if len(receipts) + len(engine_urls) - engine_urls.index(url) - 1 < least:
                raise
            log.warning("evaluating without it: %s", fault)
        finally:
            engine.close()
    newest = max(receipts.values(), key=lambda receipt: receipt.policy_version)
    held = [url for url, receipt in receipts.items() if receipt == newest]
    if len(held) < least or any(r != newest and r.policy_version == newest.policy_version for r in receipts.values()):
        raise SyncError(f"the engines hold different weights: {receipts}")
    return newest, held


def refuse_other_base(engine_url: str, model_path: Path, *, timeout_seconds: float, adapted: bool = False) -> None:
    """Raises `SyncError` for a running engine that does not hold the weights of `model_path`, a folder; with `adapted`
    whatever adapter it has is left out. `CheckpointError`: the folder has no weights to compare with."""
    from syncline.bridges.adapter import is_adapter_name
    from syncline.bridges.verify import faults_of
    from syncline.engines.client import EngineController

    engine = EngineController(engine_url, timeout_seconds=timeout_seconds)
    try:
        served = engine.parameters()
    finally:
        engine.close()
    own = {name: digest for name, digest in served.items() if not (adapted and is_adapter_name(name))}
    if faults := faults_of(model_path, own):
        told = f"{engine.name} does not hold the weights of {model_path} (model.path)"
        raise SyncError("\n".join([f"{told}; serve these, or name those that it holds:", *faults]))
