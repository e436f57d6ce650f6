"""The shell recipes say what they were told in the words of `syncline`, and nothing else."""

import os
import subprocess
from pathlib import Path

import pytest

from syncline.cli.run import _apart
from syncline.config import load

ROOT = Path(__file__).parents[3]
RECIPES = ROOT / "recipes" / "rollout_servers"
GPUS = ["engine.devices=[0,1]", "learner.devices=[2,3]", "learner.data_parallel_size=2"]


@pytest.fixture
def path(tmp_path: Path) -> str:
    """A PATH whose `syncline` prints the words it is given."""
    command = tmp_path / "syncline"
    command.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    command.chmod(0o755)
    return f"{tmp_path}:{os.environ['PATH']}"


def words(script: str, *given: str, path: str, **variables: str) -> list[str]:
    told = subprocess.run(
        [str(RECIPES / script), *given], env={"PATH": path, **variables}, capture_output=True, text=True, check=True
    )
    return told.stdout.split()


@pytest.mark.parametrize(
    ("script", "verb"), [("servers.sh", ["serve"]), ("train.sh", ["run", "--engines-apart"]), ("both.sh", ["run"])]
)
def test_variables_and_words_become_the_same_fields(script: str, verb: list[str], path: str) -> None:
    told = [*verb, "--config", "run.yaml", *GPUS, "engine.start_timeout_seconds=60", "run.seed=3"]
    given = {"server_gpus": "0,1", "train_gpus": "2,3", "config": "run.yaml", "wait_timeout": "60"}
    assert words(script, *(f"{name}={value}" for name, value in given.items()), "run.seed=3", path=path) == told
    assert words(script, "run.seed=3", path=path, **given) == told


def test_a_missing_file_is_asked_for(path: str) -> None:
    refused = subprocess.run([str(RECIPES / "train.sh")], env={"PATH": path}, capture_output=True, text=True)
    assert refused.returncode != 0
    assert "config=configs/rollout_servers.yaml" in refused.stderr


@pytest.mark.parametrize(
    ("word", "remedy"),
    [
        ("server_log=a.log", "set run.dir"),
        ("wait_interval=2", "ever less often"),
        ("debug=true", "every process logs in run.dir"),
        ("train_env=NCCL_DEBUG=INFO", "set variables before the command"),
        ("force_kill_port=true", "nothing of others is killed"),
    ],
)
def test_words_of_other_launchers_say_what_there_is_instead(word: str, remedy: str, path: str) -> None:
    given = [str(RECIPES / "both.sh"), "config=run.yaml", word]
    refused = subprocess.run(given, env={"PATH": path}, capture_output=True, text=True)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.startswith(f"{word}: ")
    assert remedy in refused.stderr


def test_the_file_that_they_name_loads_for_either_side() -> None:
    file = ROOT / "configs" / "rollout_servers.yaml"
    config = load(file)
    assert len(config.engine.devices) == 6
    learner = load(file, _apart(config))
    assert [server.url for server in learner.engine.servers] == [f"http://127.0.0.1:{8080 + i}" for i in range(6)]
    assert learner.engine.devices == (0,), "an address has its GPUs elsewhere"
