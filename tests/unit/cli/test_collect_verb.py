"""`syncline collect` over HTTP, on processes that answer as engines do, and die as they do."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml
from character_tokenizer import CharacterTokenizer

from syncline.cli import main
from syncline.launch.supervisor import answers
from syncline.offline import collect as collecting

STUB = Path(__file__).parents[2] / "stub_engine.py"
NUM_QUESTIONS = 25
NUM_ITEMS = NUM_QUESTIONS * 8


@pytest.fixture(autouse=True)
def character_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collecting, "load_tokenizer", lambda path: CharacterTokenizer())


@contextmanager
def stub() -> Iterator[tuple[subprocess.Popen, str]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen([sys.executable, str(STUB), str(port)])
    try:
        deadline = time.monotonic() + 30
        while not answers(f"http://127.0.0.1:{port}/health"):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.02)
        yield process, f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def pipeline_file(folder: Path, **collect: object) -> str:
    rows = [{"question": f"what is {n}?", "answer": f"#### {n}"} for n in range(NUM_QUESTIONS)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {
        "run": {"dir": str(folder / "run")},
        "model": {"path": "any", "max_length": 512, "lora": {}},
        "engine": {"max_num_seqs": 4},
        "collect": {
            "questions": {"path": str(folder / "rows.jsonl")}, "max_tokens": 100, "lost_after_seconds": 0.5, **collect,
        },
        "eval": {"sets": [{"name": "made", "made": {}}], "max_tokens": 32},
    }  # fmt: skip
    (folder / "pipeline.yaml").write_text(yaml.safe_dump(values))
    return str(folder / "pipeline.yaml")


def kill_when(folder: Path, process: subprocess.Popen, *, lines: int) -> threading.Thread:
    def watch() -> None:
        while sum(path.read_bytes().count(b"\n") for path in folder.glob("run/collect-*/attempts.jsonl")) < lines:
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def facts(folder: Path) -> dict:
    [manifest] = folder.glob("run/collect-*/manifest.json")
    return json.loads(manifest.read_text())["facts"]


def test_a_killed_engines_work_is_done_by_another(tmp_path: Path) -> None:
    file = pipeline_file(tmp_path, adapter=str(tmp_path / "adapter"))
    with stub() as (dying, first), stub() as (_, second):
        kill_when(tmp_path, dying, lines=40)
        assert main(["collect", file, "--engine-url", first, "--engine-url", second]) == 0
    [path] = tmp_path.glob("run/collect-*/rollouts.jsonl")
    rollouts = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rollouts) == len({rollout["key"] for rollout in rollouts}) == NUM_ITEMS
    assert {rollout["model"] for rollout in rollouts} == {f"base+{tmp_path / 'adapter'}"}, "the adapter was served"
    assert sum(rollout["correct"] for rollout in rollouts) == 8, "the one question whose answer is 24"
    told = facts(tmp_path)
    assert told["sampled"] == NUM_ITEMS and told["engines_lost"] == 1 and 0 < told["sampled_again"] <= 8


def test_the_last_engines_death_is_code_3_and_the_next_call_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = pipeline_file(tmp_path)
    with stub() as (dying, url):
        kill_when(tmp_path, dying, lines=30)
        assert main(["collect", file, "--engine-url", url]) == 3
    said = capsys.readouterr().err
    assert "no engine is left" in said and f"nobody listens at {url}" in said
    [attempts] = tmp_path.glob("run/collect-*/attempts.jsonl")
    before = attempts.read_bytes()
    with stub() as (_, url):
        assert main(["collect", file, "--engine-url", url]) == 0
        assert main(["collect", file, "--engine-url", url]) == 0, "a finished stage is not done again"
    assert attempts.read_bytes().startswith(before) and before.count(b"\n") >= 30
    told = facts(tmp_path)
    assert (told["resumed"], told["sampled"]) == (before.count(b"\n"), NUM_ITEMS - before.count(b"\n"))
