"""A run's folder is claimed by one run at a time, and neither overwritten nor continued by accident."""

import fcntl
import os
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from syncline.config import RunConfig, load, resolve
from syncline.errors import ConfigError
from syncline.launch.run_folder import LOCK_FILE, LOCK_SECONDS, changed_fields, claim, config_text


def config(folder: Path, *, seed: int = 0, num_steps: int = 4, **sections: Any) -> RunConfig:
    run = {"dir": str(folder), "num_steps": num_steps, "groups_per_step": 2, "seed": seed}
    base = {
        "run": run,
        "model": {"path": "m"},
        "sampling": {"max_tokens": 16},
        "environments": [{"task": "arithmetic"}],
    }
    return resolve(base | sections)


def claimed(config: RunConfig, *, resume: bool = False, overwrite: bool = False) -> Path:
    with claim(config, resume=resume, overwrite=overwrite) as folder:
        return folder.path


def started(folder: Path) -> Path:
    """A run with one file of its own."""
    claimed(config(folder))
    (folder / "metrics.jsonl").write_text("{}\n")
    return folder


def test_the_resolved_config_is_written(tmp_path: Path) -> None:
    claimed(config(tmp_path / "x", seed=3))
    assert load(tmp_path / "x/config.yaml") == config(tmp_path / "x", seed=3)


@pytest.mark.parametrize(
    "text", ["1e-6", "1e5", "012", "true", "null", "2024-01-01", "a: b", "é\n", "nan", ".5", "=", "~"]
)
def test_config_text_loads_to_an_equal_config(tmp_path: Path, text: str) -> None:
    written = config(
        tmp_path,
        environments=[
            {"task": "arithmetic", "name": text, "args": {"text": text, "list": [text, 1e-6, 3, None, True]}}
        ],
        learner={"optimizer": {"learning_rate": 1e-6}},
    )
    (tmp_path / "c.yaml").write_text(config_text(written))
    assert load(tmp_path / "c.yaml") == written


def test_processes_get_the_values_that_the_file_has(tmp_path: Path) -> None:
    """Not what JSON would make of them: its keys are all texts, and it knows no dates."""
    args = {"weights": {1: 0.5, "2": 0.1}, "since": date(2024, 1, 1), "pairs": [[1, 2]]}
    written = config(tmp_path, environments=[{"task": "arithmetic", "args": args}])
    (tmp_path / "c.yaml").write_text(config_text(written))
    assert load(tmp_path / "c.yaml").environments[0].args == args


def test_an_existing_run_is_refused_with_the_ways_out(tmp_path: Path) -> None:
    folder = started(tmp_path / "x")
    with pytest.raises(
        ConfigError, match=r"run\.dir: .* holds a run already; go on with --resume, start over with --over"
    ):
        claimed(config(folder))
    assert (folder / "metrics.jsonl").exists()


def test_overwrite_empties_a_run_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = started(tmp_path / "x")
    (folder / "logs").mkdir()
    claimed(config(folder), overwrite=True)
    assert sorted(path.name for path in folder.iterdir()) == [LOCK_FILE, "config.yaml"]
    stranger = tmp_path / "thesis"
    stranger.mkdir()
    (stranger / "config.yaml").write_text("mine")
    with pytest.raises(ConfigError, match="holds files that no run wrote"):
        claimed(config(stranger), overwrite=True)
    assert (stranger / "config.yaml").read_text() == "mine"
    monkeypatch.chdir(folder)
    with pytest.raises(ConfigError, match="holds the current directory"):
        claimed(config(folder), overwrite=True)


def test_resume_keeps_the_run_and_may_lengthen_it(tmp_path: Path) -> None:
    folder = started(tmp_path / "x")
    claimed(config(folder, num_steps=9, engine={"port": 9000}, trajectory={"lease_seconds": 900.0}), resume=True)
    assert (folder / "metrics.jsonl").exists()
    assert load(folder / "config.yaml").run.num_steps == 9


def test_resume_refuses_what_would_change_the_run(tmp_path: Path) -> None:
    folder = started(tmp_path / "x")
    before = (folder / "config.yaml").read_text()
    changed = config(folder, seed=1, learner={"optimizer": {"learning_rate": 0.5}})
    with pytest.raises(ConfigError) as refused:
        claimed(changed, resume=True)
    assert refused.value.faults[0].startswith("run.seed: 1 differs from 0")
    assert refused.value.faults[1].startswith("learner.optimizer.learning_rate: 0.5 differs from 1e-06")
    assert "run.num_steps" in refused.value.faults[2]
    assert (folder / "config.yaml").read_text() == before


def test_there_must_be_a_run_to_resume(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no run to resume; leave out --resume"):
        claimed(config(tmp_path / "x"), resume=True)
    assert not (tmp_path / "x").exists()


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "x"
    with (
        claim(config(folder), resume=False, overwrite=False),
        pytest.raises(ConfigError, match=f"is in use by the run of pid {os.getpid()}"),
    ):
        claimed(config(folder), resume=True)


def test_the_remains_of_a_dead_run_are_waited_for_until_the_deadline(tmp_path: Path) -> None:
    folder = started(tmp_path / "x")
    times = iter([0.0, LOCK_SECONDS / 2, LOCK_SECONDS + 1])
    with (folder / LOCK_FILE).open("r+") as guardian:
        fcntl.flock(guardian, fcntl.LOCK_EX)
        guardian.write("999999999")
        guardian.flush()
        with (
            pytest.raises(ConfigError, match="in use by the run of pid 999999999"),
            claim(config(folder), resume=True, overwrite=False, clock=lambda: next(times)),
        ):
            pass
    assert list(times) == [], "it asked again before it gave up"


def test_changed_fields_are_named_by_their_path() -> None:
    old = {"a": {"b": 1, "c": [1]}, "d": None}
    new = {"a": {"b": 2, "c": [1]}, "d": {"e": 1}}
    assert changed_fields(old, new) == {"a.b": (1, 2), "d": (None, {"e": 1})}
