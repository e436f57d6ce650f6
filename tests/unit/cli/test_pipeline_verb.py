"""The whole pipeline, its stages real, on a model of a few thousand parameters behind a small engine."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("trl", reason="the extra `offline` is not installed")

from real_engine import make_tiny_model
from small_engine import small_engine
from small_pipeline import make_guessing_model, write_file

from syncline.cli import main


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_guessing_model(tmp_path_factory.mktemp("pipeline") / "model")


def manifests(run: Path, stage: str) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(run.glob(f"{stage}-*/manifest.json"))]


def test_two_rounds_end_with_a_report_and_done_again_ask_no_engine(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = str(write_file(tmp_path, model))
    with small_engine(model) as (engine, url):
        assert main(["pipeline", file, "--engine-url", url]) == 0
        assert engine.num_generated == 2 * 24 * 8 + 3 * 8 * (1 + 2)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    digests = [one["model"] for one in summary["evaluations"]]
    assert len(set(digests)) == 3, "base, first and second adapter"
    for number, own in enumerate(summary["rounds"]):
        rollouts = (tmp_path / "run" / own["collect"] / "rollouts.jsonl").read_text().splitlines()
        assert {json.loads(line)["model"] for line in rollouts} == {digests[number]}
    policies = sorted(
        (m["facts"]["policy_version"], m["facts"]["digest"]) for m in manifests(tmp_path / "run", "policy")
    )
    assert policies == [(-1, digests[0]), (1, digests[1]), (2, digests[2])]
    page = (tmp_path / "run" / "report.html").read_text()
    assert "McNemar" in page and page.count("data:image/png") >= 6 and digests[-1] in page

    capsys.readouterr()
    assert main(["pipeline", file, "--engine-url", "http://127.0.0.1:9"]) == 0
    assert capsys.readouterr().out.count("was finished") == 9
    moved = shutil.copytree(model, tmp_path / "moved")
    assert main(["pipeline", file, f"model.path={moved}", "--engine-url", "http://127.0.0.1:9"]) == 0
    assert capsys.readouterr().out.count("was finished") == 9
    assert main(["report", str(tmp_path / "run")]) == 0
    assert main(["eval", file, "run.seed=0", "--engine-url", "http://127.0.0.1:9"]) == 0


def test_a_running_engine_of_another_model_is_refused(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its answers would be what the trained model is compared with."""
    other = make_tiny_model(tmp_path / "other", hidden_size=64)
    with small_engine(other) as (engine, url):
        assert main(["pipeline", str(write_file(tmp_path, model)), "--engine-url", url]) == 5
    told = capsys.readouterr().err
    assert f"{url} does not hold the weights of {model}" in told and "down_proj" in told
    assert engine.num_generated == 0 and not list(tmp_path.glob("run/policy-*"))


@pytest.mark.slow
def test_a_changed_field_does_again_what_depends_on_it_and_no_more(model: Path, tmp_path: Path) -> None:
    file = str(write_file(tmp_path, model, num_rounds=1))
    with small_engine(model) as (_, url):
        assert main(["pipeline", file, "--engine-url", url]) == 0
    with small_engine(model) as (engine, url):
        assert main(["pipeline", file, "dpo.learning_rate=1e-3", "--engine-url", url]) == 0
        assert engine.num_generated == 8 * (1 + 2), "the new adapter was evaluated, nothing else was asked"
    counts = {stage: len(manifests(tmp_path / "run", stage)) for stage in ("collect", "pairs", "dpo", "evaluate")}
    assert counts == {"collect": 1, "pairs": 1, "dpo": 2, "evaluate": 3}


def test_rollouts_without_a_pair_stop_it_by_name(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_file(tmp_path, model, num_rounds=1)
    with small_engine(model) as (_, url):
        rows = (tmp_path / "train.jsonl").read_text().splitlines()
        wrong = [json.dumps({**json.loads(row), "answer": "#### 123456789"}) + "\n" for row in rows]
        (tmp_path / "train.jsonl").write_text("".join(wrong))
        assert main(["pipeline", str(file), "--engine-url", url]) == 2
    assert "pair" in capsys.readouterr().err


@pytest.mark.slow
def test_killed_again_and_again_it_ends_with_the_same_adapter(model: Path, tmp_path: Path) -> None:
    """Killed by SIGKILL while it samples, trains and evaluates; no question is asked twice."""
    calm, killed = tmp_path / "calm", tmp_path / "killed"
    for folder in (calm, killed):
        folder.mkdir()
    with small_engine(model) as (_, url):
        assert main(["pipeline", str(write_file(calm, model, num_rounds=1)), "--engine-url", url]) == 0
    argv = [sys.executable, "-m", "syncline", "pipeline", str(write_file(killed, model, num_rounds=1))]
    run = killed / "run"
    with small_engine(model) as (engine, url):
        for reached in (
            lambda: engine.num_generated >= 10,
            lambda: engine.num_generated >= 100,
            lambda: any(run.glob("dpo-*/checkpoints/checkpoint-4/complete")),
            lambda: len(list(run.glob("evaluate-*"))) == 2,
        ):
            kill_when(reached, [*argv, "--engine-url", url], killed / "log")
        with (killed / "log").open("a") as log:
            assert subprocess.run([*argv, "--engine-url", url], stdout=log, stderr=log, timeout=200).returncode == 0
        assert engine.num_generated <= 24 * 8 + 2 * 8 * 3 + 3 * 512, "what was in flight alone is asked again"
    for stage, file in (("collect", "rollouts.jsonl"), ("pairs", "pairs.jsonl"), ("evaluate", "evaluation.json")):
        written = [{m["outputs"][file] for m in manifests(path, stage)} for path in (calm / "run", run)]
        assert written[0] == written[1], stage
    adapters = [next(path.glob("run/dpo-*/adapter/adapter_model.safetensors")).read_bytes() for path in (calm, killed)]
    assert adapters[0] == adapters[1]
    assert sum(len(m["attempts"]) for stage in ("collect", "dpo", "evaluate") for m in manifests(run, stage)) >= 7


def kill_when(reached, argv: list[str], log_path: Path) -> None:
    with log_path.open("a") as log:
        process = subprocess.Popen(argv, stdout=log, stderr=log, env=dict(os.environ))
    deadline = time.monotonic() + 200
    while not reached():
        assert process.poll() is None, f"it ended before it was killed:\n{log_path.read_text()[-3000:]}"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
