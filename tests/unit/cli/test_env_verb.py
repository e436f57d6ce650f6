"""`syncline env`, a process of its own, tells the trajectory server how many tasks a pass has."""

import json
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from real_engine import save_tokenizer
from trajectory_process import TrajectoryProcess

TEXT = """
run: {{dir: {folder}/run, num_steps: 10, groups_per_step: 1}}
model: {{path: {folder}, max_length: 128}}
sampling: {{max_tokens: 16}}
environments: [{{name: math, task: {task}, args: {args}{overlong}}}]
engine: {{device: cpu}}
learner: {{token_budget: 512, device: cpu}}
"""


@pytest.mark.parametrize(
    ("task", "args", "overlong", "num_tasks"),
    [
        ("trl_rewards", "{rewards: ['builtins:len'], path: FOLDER/rows.jsonl}", "", 3),
        ("trl_rewards", "{rewards: ['builtins:len'], path: FOLDER/rows.jsonl}", ", overlong: {cache_tokens: 4}", 3),
        ("arithmetic", "{}", "", None),
    ],
)
def test_the_server_knows_what_a_pass_is(
    task: str, args: str, overlong: str, num_tasks: int | None, tmp_path: Path
) -> None:
    save_tokenizer(tmp_path)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"prompt": f"{n}?"}) + "\n" for n in range(3)))
    written = TEXT.format(folder=tmp_path, task=task, args=args, overlong=overlong).replace("FOLDER", str(tmp_path))
    (tmp_path / "run.yaml").write_text(written)
    server = TrajectoryProcess(tmp_path / "store")
    try:
        server.wait_until_ready()
        argv = [sys.executable, "-m", "syncline", "env", str(tmp_path / "run.yaml")]
        argv += ["--engine-url", "http://127.0.0.1:9", "--trajectories-url", server.url]
        with subprocess.Popen(argv) as worker:
            deadline, told = time.monotonic() + 60, {}
            while told.get("seconds_since_heard") is None:
                assert worker.poll() is None and time.monotonic() < deadline
                told = httpx.get(f"{server.url}/status").json()["environments"]["math"]
                time.sleep(0.05)
            worker.terminate()
    finally:
        server.kill()
    assert told["num_tasks"] == num_tasks and told["num_done"] == 0
