"""`syncline run` from file to report, with real processes that answer as the verbs do and compute nothing."""

import json
import sys
from pathlib import Path

import pytest

from syncline.cli import main
from syncline.cli.run import resume_command, supervise
from syncline.config import RunConfig, resolve
from syncline.errors import ProcessDied
from syncline.launch.plan import Machine

ACTORS = r"""#!{python}
import http.server, json, pathlib, sys, time
assert sys.argv[1:3] == ["-m", "syncline"], sys.argv
verb, file, options = sys.argv[3], pathlib.Path(sys.argv[4]), dict(zip(sys.argv[5::2], sys.argv[6::2]))
run_dir = file.parent
assert file.name == "config.yaml" and file.exists()

class Ok(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404); self.end_headers()
    def log_message(self, *args): pass

print("I am", verb, flush=True)
if verb in ("serve", "trajectories"):
    server = http.server.HTTPServer(("127.0.0.1", int(options["--port"])), Ok)
    if verb == "serve":
        (run_dir / "engine.json").write_text(json.dumps(dict(name="fake", version="0", device="cpu")))
    server.serve_forever()
elif verb == "env":
    time.sleep(600)
elif verb == "evaluate":
    out = pathlib.Path(options["--out"])
    trained = (run_dir / "metrics.jsonl").exists()
    out.write_text(json.dumps(dict(accuracy=0.9 if trained else 0.4)))
elif verb == "train":
    metrics = run_dir / "metrics.jsonl"
    done = len(metrics.read_text().splitlines()) if metrics.exists() else 0
    with metrics.open("a") as file:
        for step in range(done + 1, {last_step} + 1):
            file.write(json.dumps(dict(step=step, time=0, reward=step / 4)) + "\n")
    sys.exit({exit_code})
"""


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return resolve(
        {
            "run": {"dir": str(tmp_path / "run"), "num_steps": 4, "groups_per_step": 1},
            "model": {"path": "m", "max_length": 64},
            "sampling": {"max_tokens": 16},
            "environments": [{"task": "arithmetic"}],
            "evaluation": {"num_tasks": 2},
        }
    )


def machine(folder: Path, *, last_step: int, exit_code: int = 0) -> Machine:
    """A machine whose Python plays every verb; its learner ends after `last_step` with `exit_code`."""
    actors = folder / "actors"
    text = ACTORS.replace("{python}", sys.executable).replace("{last_step}", str(last_step))
    actors.write_text(text.replace("{exit_code}", str(exit_code)))
    actors.chmod(0o755)
    return Machine(num_cores=1, gpus=(), python=str(actors))


def test_a_run_is_evaluated_trained_evaluated_and_summed_up(
    tmp_path: Path, config: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = supervise(config, resume=False, overwrite=False, machine=machine(tmp_path, last_step=4))
    assert (summary["heldout_before"], summary["heldout_after"]) == (0.4, 0.9)
    assert (summary["steps"], summary["reward_first"], summary["reward_last"]) == (4, 0.375, 0.875)
    assert summary["engine"] == {"name": "fake", "version": "0", "device": "cpu"}
    folder = Path(config.run.dir)
    assert json.loads((folder / "summary.json").read_text()) == summary
    assert (folder / "report.html").exists()
    assert json.loads((folder / "processes.json").read_text())["processes"] == []
    printed = capsys.readouterr().out.splitlines()
    assert any(line.split(" | ") == ["learner          ", "I am train"] for line in printed)
    assert [line for line in printed if line.startswith("step 4/4  reward 1.000")] != []


def test_a_failed_run_goes_on_where_it_stopped(tmp_path: Path, config: RunConfig) -> None:
    with pytest.raises(ProcessDied, match="learner") as died:
        supervise(config, resume=False, overwrite=False, machine=machine(tmp_path, last_step=2, exit_code=5))
    assert died.value.exit_code == 5
    folder = Path(config.run.dir)
    assert not (folder / "summary.json").exists()
    before = (folder / "evaluation-before.json").stat().st_mtime_ns
    summary = supervise(config, resume=True, overwrite=False, machine=machine(tmp_path, last_step=4))
    assert summary["steps"] == 4
    assert (folder / "evaluation-before.json").stat().st_mtime_ns == before, "measured once, before any training"
    assert summary["heldout_after"] == 0.9


def test_an_existing_run_is_a_users_mistake(
    tmp_path: Path, config: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    supervise(config, resume=False, overwrite=False, machine=machine(tmp_path, last_step=4))
    assert main(["run", str(tmp_path / "run" / "config.yaml")]) == 2
    assert "go on with --resume" in capsys.readouterr().err


def test_resume_command_is_ready_to_paste() -> None:
    assert resume_command("my runs/a.yaml", ["run.seed=1"]) == "syncline run 'my runs/a.yaml' run.seed=1 --resume"
