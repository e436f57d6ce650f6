"""`syncline collect` over HTTP, on processes that answer as engines do, and die as they do."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from character_tokenizer import CharacterTokenizer
from jinja2 import TemplateError
from real_engine import make_tiny_model
from small_engine import SmallEngine, small_engine

from syncline.cli import main
from syncline.config import RunConfig
from syncline.config.schema import Lora, Model
from syncline.errors import ProcessDied
from syncline.launch.supervisor import answers
from syncline.learner.model import load_model
from syncline.offline import collect as collecting
from syncline.offline import engines

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


def test_an_engine_of_other_weights_than_the_files_is_refused_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its answers would be taken for those of the model that is trained on them."""
    asked, other = make_tiny_model(tmp_path / "asked"), make_tiny_model(tmp_path / "other", hidden_size=64)
    file = pipeline_file(tmp_path)
    with small_engine(other) as (engine, url):
        assert main(["collect", file, f"model.path={asked}", "--engine-url", url]) == 5
    told = capsys.readouterr().err
    assert f"{url} does not hold the weights of {asked}" in told and "model.path" in told
    assert engine.num_generated == 0 and not list(tmp_path.glob("run/collect-*"))


def test_an_engine_of_the_files_weights_is_sampled_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class FewTokens(SmallEngine):
        """Reads any token as one of its vocabulary."""

        def _sample(self, body: Mapping[str, Any]) -> dict[str, Any]:
            return super()._sample({**body, "prompt_token_ids": [token % 8 for token in body["prompt_token_ids"]]})

    model = make_tiny_model(tmp_path / "model")
    with small_engine(model, FewTokens) as (engine, url):
        few = [f"model.path={model}", "collect.questions.num_questions=1", "collect.max_tokens=2"]
        assert main(["collect", pipeline_file(tmp_path), *few, "--engine-url", url]) == 0
    assert engine.num_generated == 8 and "is not proved" not in capsys.readouterr().err


def test_what_the_file_merges_is_what_is_collected_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a pipeline: the model that its adapter makes of `model.path`, and not that."""
    base = make_tiny_model(tmp_path / "base", hidden_size=64)
    adapted = load_model(Model(path=str(base), lora=Lora(rank=4)), device=torch.device("cpu"))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.fill_(0.05)
    adapted.save_pretrained(tmp_path / "adapter")  # pyright: ignore[reportCallIssue]
    words = [f"model.path={base}", f"merge.adapter={tmp_path}/adapter", "engine.device=cpu", "dpo.device=cpu"]
    with small_engine(base) as (engine, url):
        assert main(["collect", pipeline_file(tmp_path), *words, "--engine-url", url]) == 5
    [merged] = tmp_path.glob("run/merge-*/model")
    assert f"does not hold the weights of {merged}" in capsys.readouterr().err and not engine.num_generated

    def planned(run: RunConfig, **others: object) -> None:
        raise ProcessDied(f"would serve {run.model.path}")

    monkeypatch.setattr(engines, "plan_servers", planned)
    assert main(["collect", str(tmp_path / "pipeline.yaml"), *words]) == ProcessDied.exit_code
    assert f"would serve {merged}" in capsys.readouterr().err


def test_a_chat_template_that_refuses_the_prompt_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Refusing(CharacterTokenizer):
        chat_template = "refuses"

        def apply_chat_template(self, *args: object, **others: object) -> list[int]:
            raise TemplateError("a system message comes first")

    monkeypatch.setattr(collecting, "load_tokenizer", lambda path: Refusing())
    with stub() as (_, url):
        assert main(["collect", pipeline_file(tmp_path), "--engine-url", url]) == 2
    assert "model.tokenizer: the chat template refuses" in capsys.readouterr().err


def test_what_cannot_be_proved_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The weights lie where the engine runs: here is a tokenizer at most."""
    with stub() as (_, url):
        words = ["collect.questions.num_questions=1", "--engine-url", url]
        assert main(["collect", pipeline_file(tmp_path), *words]) == 0
    assert f"that {url} holds the weights of model.path = 'any' is not proved" in capsys.readouterr().err


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
