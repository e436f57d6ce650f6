"""Which weights a run's engines hold, for verbs that name their results by them."""

import logging
from collections.abc import Sequence

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
