"""The run's web page in a real browser, headless: live, behind the token, and deaf to what rollouts say."""

import json
import re
import shutil
import subprocess
import threading
import time
from pathlib import Path

import pytest
import uvicorn
from starlette.types import Receive, Scope, Send

from syncline.observe.files import ENGINE_FILE, PROCESSES_FILE
from syncline.observe.sinks import JsonlSink
from syncline.trajectory.app import build_app
from syncline.trajectory.ledger import QueueLimits
from syncline.trajectory.store import TrajectoryStore
from syncline.types import (
    Completion,
    FinishReason,
    Message,
    Rollout,
    RolloutGroup,
    RolloutStatus,
    TrainingSample,
    VersionSpan,
)

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome is installed")
TOKEN = "a-token"
HOSTILE = "<img src=x onerror=document.title='taken'><script>document.title='taken'</script>"
WORDS = ["four", " or", " five", HOSTILE]
NUM_STEPS = 3


def metrics(step: int) -> dict[str, float]:
    times = {"time/step_seconds": 2.0, "time/wait_seconds": 1.0, "time/learn_seconds": 0.75, "time/sync_seconds": 0.25}
    ages = {
        "sample/staleness_mean": 0.5,
        "sample/staleness_max": 1.0,
        "sync/pause_seconds": 0.125,
        "sync/bytes": 4096.0,
    }
    return {"reward": step / 4, "reward_std": 0.25, "policy_version": step, "tokens/sampled": 90} | times | ages


def group() -> RolloutGroup:
    spans = (VersionSpan(1, 0, 2), VersionSpan(2, 2, 4))
    sample = TrainingSample.from_completion(
        (0,), Completion((0, 1, 2, 3), (-0.5, -0.25, -2.5, -0.125), spans, FinishReason.STOP)
    )
    said = (Message("user", f"2+2? {HOSTILE}"), Message("assistant", "".join(WORDS)))
    return RolloutGroup(
        "g", f"math {HOSTILE}", 5, (Rollout((sample,), 1.0, RolloutStatus.COMPLETED, {HOSTILE: 1.0}, said),) * 2
    )


class GrowingRun:
    """The server's app; every time the page asks for steps, one more has been trained."""

    def __init__(self, app, sink: JsonlSink) -> None:
        self._app, self._sink, self._step = app, sink, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope.get("path") == "/ui/steps" and self._step < NUM_STEPS:
            self._step += 1
            self._sink.log(self._step, metrics(self._step))
            self._sink.log_rollouts(self._step, [group()], {"g": [0.5, -0.5]})
        await self._app(scope, receive, send)


@pytest.fixture
def url(tmp_path):
    """Of a server with a token, in this process."""
    run_dir = tmp_path / "run"
    sink = JsonlSink(run_dir, resumed_step=0, decode=lambda ids: "".join(WORDS[i] for i in ids))
    (run_dir / ENGINE_FILE).write_text(json.dumps({"name": "vllm", "version": "0.32.0", "device": f"cpu {HOSTILE}"}))
    (run_dir / PROCESSES_FILE).write_text(json.dumps({"processes": [{"name": "engine"}, {"name": "engine-1"}]}))
    limits = QueueLimits(groups_per_step=2, rollouts_per_group=2, max_staleness=1, lease_seconds=60.0)
    weights = {"math": 3.0, HOSTILE: 1.0}
    with TrajectoryStore(
        run_dir / "t.sqlite", run_id="a run", limits=limits, weights=weights, clock=time.monotonic
    ) as store:
        app = build_app(store, host="127.0.0.1", max_request_bytes=1000, token=TOKEN)
        config = uvicorn.Config(GrowingRun(app, sink), port=0, lifespan="off", log_level="warning")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield f"127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        server.should_exit = True
        thread.join()
        sink.close()


def dom(address: str, folder: Path, *, seconds: int) -> str:
    """The page's elements after `seconds` of its own time, which passes as fast as it can."""
    flags = (
        "--headless=new --no-sandbox --disable-gpu --disable-background-networking --disable-dev-shm-usage --dump-dom"
    )
    argv = [
        str(CHROMIUM),
        *flags.split(),
        f"--virtual-time-budget={1000 * seconds}",
        f"--user-data-dir={folder}",
        address,
    ]
    return subprocess.run(argv, capture_output=True, text=True, timeout=120).stdout


def test_the_page_follows_the_run_and_shows_what_it_said_as_text(url, tmp_path):
    page = dom(f"http://syncline:{TOKEN}@{url}/ui", tmp_path / "profile", seconds=12)
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", page.partition("<body>")[2]))
    assert "<title>3 · a run</title>" in page, "the last of three steps was shown, and nobody else set the title"
    assert page.count("<img") == 0 and page.count("<script") == 1, "what a run said became markup"
    assert '<p id="fault" role="alert" class="">' in page
    assert "reward 0.75 ± 0.25" in text and "staleness 0.5 oldest 1" in text and "tokens / second 45" in text
    assert "of 4; 0 being sampled" in text and "No batch yet: no learner has started yet" in text
    assert "engine-1 vllm 0.32.0 cpu &lt;img" in text and "running 3 0.125 s 4,096" in text
    assert page.count("<rect") == 3 * NUM_STEPS and "step 2: sync 0.25 s, the engine paused 0.125 s" in page
    assert '<span data-v="2" title="logprob -2.5, version 2" style="--s: 0.5; --v: var(--c);"> five</span>' in page
    assert text.count("&lt;script&gt;") >= 4 and "2+2? &lt;img" in text


def test_without_the_token_there_is_no_page(url, tmp_path):
    assert "Sample rollouts" not in dom(f"http://{url}/ui", tmp_path / "profile", seconds=2)
