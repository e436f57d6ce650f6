"""How long a learner's bridge waits for an engine that takes connections and answers nothing."""

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from real_engine import run_values

from syncline.bridges.ranks import ONE_RANK
from syncline.cli.bridge import connect_engines
from syncline.config import RunConfig
from syncline.errors import EngineTimeout
from syncline.protocols import Receipt

RECEIPT = Receipt(1, "0" * 64)


@pytest.mark.parametrize(
    "ask",
    [
        lambda engine: engine.receipt(),
        lambda engine: engine.adopt(RECEIPT),
        lambda engine: engine.resume(RECEIPT),
        lambda engine: engine.switch(RECEIPT),
        lambda engine: engine.membership(),
        lambda engine: engine.adapters(),
    ],
    ids=["receipt", "adopt", "resume", "switch", "membership", "adapters"],
)
def test_no_call_of_a_publish_outlasts_the_bridges_deadline(ask: Callable[[Any], object], tmp_path: Path) -> None:
    values = run_values(tmp_path, tmp_path, bridge={"timeout_seconds": 0.05})
    values["engine"]["start_timeout_seconds"] = 1
    config = RunConfig.model_validate(values)
    with socket.create_server(("127.0.0.1", 0)) as hung:
        url = f"http://127.0.0.1:{hung.getsockname()[1]}"
        [engine] = connect_engines(config, [url], None, device=torch.device("cpu"), ranks=ONE_RANK)
        with pytest.raises(EngineTimeout, match=r"did not answer /syncline/.* in 0\.05 s"):
            ask(engine)
        engine.close()
