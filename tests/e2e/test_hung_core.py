"""An engine core that hangs behind a server that answers: a real one, stopped by a signal."""

import asyncio
import os
import signal
from pathlib import Path

import psutil
import pytest
from real_engine import make_tiny_model, run_values, running_engine

from syncline.engines.client import EngineClient, NotReady
from syncline.types import SamplingParams

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


def test_its_process_ends_and_sends_its_requests_away(tmp_path: Path) -> None:
    async def sample(url: str) -> None:
        async with EngineClient(url, timeout_seconds=120) as client:
            await client.attempt((5, 6, 7), SamplingParams(8))

    values = run_values(make_tiny_model(tmp_path / "model"), tmp_path / "run")
    values["engine"]["request_timeout_seconds"] = 120
    with running_engine(values, tmp_path) as engine:
        asyncio.run(sample(engine.url))
        [core] = [
            one for one in psutil.Process(engine.process.pid).children() if "EngineCore" in "".join(one.cmdline())
        ]
        os.kill(core.pid, signal.SIGSTOP)
        with pytest.raises(NotReady, match="the engine is ending"):
            asyncio.run(sample(engine.url))
        assert engine.process.wait(60) == 3
    assert "died: the engine core has not answered for 60 s" in engine.log.read_text()
