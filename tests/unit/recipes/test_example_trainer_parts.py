"""The example trainer's programs without their processes: what is started, what is said, and when."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from recipe_files import load_recipe

from syncline.config import resolve
from syncline.errors import ConfigError
from syncline.launch.plan import Machine

MACHINE = Machine(num_cores=2, gpus=(), python="python")


@pytest.fixture
def grpo(monkeypatch):
    return load_recipe("atropos/example_trainer/grpo.py", monkeypatch)


@pytest.fixture
def learner(monkeypatch):
    return load_recipe("atropos/example_trainer/learner.py", monkeypatch)


def started(grpo, line: str, *, serves: bool):
    args = grpo.parser().parse_args(["--model", "m", *line.split()])
    config = resolve(grpo.run_values(args))
    return {spec.name: spec for spec in grpo.processes(config, args, MACHINE, serves=serves)}


@pytest.mark.parametrize(
    ("line", "serves", "names"),
    [
        ("--weight-bridge-mode shared_vllm", True, ["trajectories", "learner"]),
        ("--weight-bridge-mode lora_only", False, ["learner"]),
        ("", True, ["trajectories", "engine", "learner"]),
        ("--weight-bridge-mode lora_restart", False, ["engine", "learner"]),
    ],
)
def test_what_is_there_already_is_not_started(grpo, line, serves, names):
    assert [*started(grpo, line, serves=serves)] == names


def test_the_learner_finds_the_engine_by_its_file_or_by_its_port(grpo):
    line = "--weight-bridge-mode shared_vllm --vllm-config-path there --debug-loading"
    options = " ".join(started(grpo, line, serves=True)["learner"].argv[3:])
    assert options == "--bridge-config there --trajectories-url http://127.0.0.1:8000 --debug-loading"
    options = " ".join(started(grpo, "--vllm-port 9100 --log-dir logs", serves=True)["learner"].argv[3:])
    assert options == "--engine-url http://127.0.0.1:9100 --trajectories-url http://127.0.0.1:8000"


def test_a_trajectory_server_on_another_machine_is_spoken_to_and_not_started(grpo):
    line = "--weight-bridge-mode lora_only --atropos-url http://other:8100"
    [learner] = started(grpo, line, serves=False).values()
    assert " ".join(learner.argv[3:]) == "--engine-url http://127.0.0.1:9001 --trajectories-url http://other:8100"


def test_a_run_that_trained_nothing_is_begun_anew_under_other_flags(grpo, tmp_path):
    def config(line: str):
        return resolve(grpo.run_values(grpo.parser().parse_args(["--save-path", str(tmp_path), *line.split()])))

    mistyped, meant = config("--model no/such"), config("--model m")
    assert not grpo.goes_on(mistyped)
    with grpo.claim(mistyped, resume=False, overwrite=False):
        pass
    assert grpo.goes_on(mistyped) and not grpo.goes_on(meant)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    assert grpo.goes_on(meant)
    with pytest.raises(ConfigError, match="differs from 'no/such'"), grpo.claim(meant, resume=True, overwrite=False):
        pass


def test_logs_go_where_they_were_asked_for(grpo):
    for directory, line in (("there", "--log-dir there"), ("trained_model_checkpoints/logs", "")):
        assert {spec.log.parent for spec in started(grpo, line, serves=True).values()} == {Path(directory)}


def test_the_learners_lines_are_shown_as_it_wrote_them(grpo, capsys):
    grpo.show("learner      | Step 1/100")
    grpo.show("supervisor   | engine is ready")
    assert capsys.readouterr().out == "Step 1/100\nsupervisor   | engine is ready\n"


@pytest.mark.parametrize("answer", [(404, b"{}"), (200, b'{"status": "ok"}'), (200, b"hello")])
def test_a_server_that_is_not_ours_is_refused_by_name(grpo, answer):
    class Other(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(answer[0])
            self.end_headers()
            self.wfile.write(answer[1])

        def log_message(self, *args): ...

    with HTTPServer(("127.0.0.1", 0), Other) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(ConfigError, match=r"not syncline's trajectory server"):
            grpo.is_served("127.0.0.1", server.server_port)
        server.shutdown()
    assert grpo.is_served("127.0.0.1", server.server_port) is False
    with pytest.raises(ConfigError, match="start run-api there"):
        grpo.is_served("no-such-host.invalid", 8000)


def run(learner, line: str, metrics: list[dict], capsys) -> list[str]:
    flags = learner.sys.modules["recipe_trainer_flags"]
    config = resolve(flags.run_values(flags.parser().parse_args(["--model", "m", *line.split()])))
    sink = learner.PromisedLines(config)
    for step, told in enumerate(metrics, start=1):
        sink.log(step, {"loss": 0.5, "grad_norm": 1.0, "time/sync_seconds": 0.25, **told})
    return capsys.readouterr().out.splitlines()


def test_a_step_says_what_happened_in_it(learner, monkeypatch, capsys):
    load_recipe("atropos/example_trainer/trainer_flags.py", monkeypatch)
    metrics = {
        "policy_version": 1,
        "reward": 0.25,
        "reward_std": 0.5,
        "sampling/sampling_logp_difference/mean": 0.0025,
        "clip_ratio/region_mean": 0.125,
    }
    assert run(learner, "--weight-bridge-mode shared_vllm", [metrics], capsys) == [
        "Step 1/10",
        "  Loss: 0.5000, Grad norm: 1.0000",
        "    GRPO: clipped=12.5%, |logp - inference|=0.00250",
        "    Reward: mean=0.2500, std=0.5000",
        "  [SINGLE-COPY] Weights updated in-place - step 1",
    ]
    skipped = {"policy_version": 1, "step/skipped": 1}
    told = run(learner, "--weight-bridge-mode shared_vllm", [skipped], capsys)
    assert told[-1] == "  [SINGLE-COPY] Nothing to learn, weights unchanged - step 1"
    for line, done in (
        ("--weight-bridge-mode lora_only", "[LORA] ✓ Hot-swapped adapter"),
        ("", "[LEGACY] ✓ vLLM restarted"),
    ):
        steps = [{"policy_version": 0}, {"policy_version": 0}, {"policy_version": 1}]
        told = [line for line in run(learner, line, steps, capsys) if not line.startswith(("Step", "  Loss"))]
        assert told == ["  Next sync after step 3"] * 2 + [f"  {done}: policy version 1, 0.25 s"]


def test_the_setup_counts_what_was_attached(learner, monkeypatch):
    flags = load_recipe("atropos/example_trainer/trainer_flags.py", monkeypatch)
    line = ["--model", "m", "--weight-bridge-mode", "shared_vllm", "--training-steps", "100"]
    config = resolve(flags.run_values(flags.parser().parse_args(line)))
    parts = SimpleNamespace(model=torch.nn.Linear(2, 3))
    assert learner.set_up(config, parts, 0, told=False) == [
        "[Setup] ✓ Attached 2 tensors to vLLM's shared memory",
        "[Setup] ✓ Single-copy mode active - using vLLM's tensors directly!",
        "[2/2] Starting training for 100 steps",
    ]
    told = learner.set_up(config, parts, 7, told=True)
    assert told[2:5] == [
        "[Setup]   weight [3, 2] torch.float32 cpu",
        "[Setup]   bias [3] torch.float32 cpu",
        "[Setup] ✓ Resuming after step 7",
    ]


def test_the_benchmark_sums_up_the_runs_times(grpo, tmp_path):
    rows = [{"step": n, "time/step_seconds": 2.0, "time/sync_seconds": 0.5, "time/wait_seconds": 1.0} for n in (1, 2)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = resolve(grpo.run_values(grpo.parser().parse_args(["--model", "m", "--save-path", str(tmp_path)])))
    assert grpo.benchmark(config, "none") == [
        "BENCHMARK SUMMARY (none)",
        "  Steps: 2",
        "  Step time: 4.0 s, 2.000 s a step",
        "  Sync time: 1.0 s, 0.500 s a step",
        "  Data fetch time: 2.0 s, 1.000 s a step",
    ]
