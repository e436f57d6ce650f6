"""What a verb cannot do is a message, before anything is started or waited for."""

from pathlib import Path

import pytest

from syncline.cli import main

TEXT = """
run: {dir: %s, num_steps: 10, groups_per_step: 4}
model: {path: some/model, max_length: 128}
sampling: {max_tokens: 16}
environments: [{task: arithmetic}]
learner: {token_budget: 512, device: cpu}
engine: {device: cpu, servers: [{url: "http://10.0.0.2:8000"}]}
"""


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "run.yaml"
    path.write_text(TEXT % (tmp_path / "run"))
    return str(path)


@pytest.mark.parametrize("index", ["1", "-1"])
def test_an_environment_that_the_file_does_not_have(file: str, index: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--engine-url", "http://127.0.0.1:1", "--trajectories-url", "http://127.0.0.1:1", "--index", index]
    assert main(["env", file, *words]) == 2
    assert f"--index: {index}, but {file} has 1 environments" in capsys.readouterr().err


def test_serving_engines_that_all_run_elsewhere(file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", file]) == 2
    assert "engine.servers: every one has a url and runs already" in capsys.readouterr().err
    assert not (tmp_path / "run-servers").exists()
