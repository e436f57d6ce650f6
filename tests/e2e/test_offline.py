"""The offline pipeline on a real vLLM that it starts itself: adapters move beside the base, nothing restarts."""

import json
from pathlib import Path

import pytest

pytest.importorskip("trl", reason="the extra `offline` is not installed")

from small_pipeline import make_guessing_model, write_file

from syncline.cli import main

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


def test_two_rounds_on_one_engine_that_is_started_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(write_file(tmp_path, make_guessing_model(tmp_path / "model"), bridge="lora"))
    assert main(["pipeline", file]) == 0
    assert capsys.readouterr().out.count("started engine") == 1
    run = tmp_path / "run"
    policies = [json.loads(path.read_text())["facts"] for path in run.glob("policy-*/manifest.json")]
    assert sorted(facts["policy_version"] for facts in policies) == [-1, 1, 2]
    assert [facts["pause_seconds"] for facts in policies if facts["policy_version"] > 0] == [0.0, 0.0]
    summary = json.loads((run / "summary.json").read_text())
    assert {own["model"] for own in summary["evaluations"]} == {facts["digest"] for facts in policies}
    assert main(["pipeline", file]) == 0
    assert "started engine" not in capsys.readouterr().out
