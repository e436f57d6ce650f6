"""`syncline check`: a good file is printed with its plan, a broken one is refused with every reason."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from syncline.cli import main
from syncline.config import eight_bits, load
from syncline.launch.ports import lease_ports

GOLDEN = Path(__file__).parents[2] / "golden" / "broken_configs"
BROKEN = sorted(GOLDEN.glob("*.yaml"))
REFUSED = "# refused: "
GOOD = """
run: {dir: runs/x, num_steps: 10, groups_per_step: 4}
model: {path: some/model, max_length: 128}
sampling: {max_tokens: 16}
environments: [{task: arithmetic}]
learner: {token_budget: 512, device: cpu}
engine: {device: cpu}
evaluation: {num_tasks: 4}
"""
LEFT_OUT = ("torch", "vllm", "transformers", "fastapi", "httpx", "matplotlib", "numpy")


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "run.yaml"
    path.write_text(GOOD)
    return str(path)


def test_there_are_ten_broken_configs_and_more() -> None:
    assert len(BROKEN) >= 10


@pytest.mark.parametrize("path", BROKEN, ids=lambda path: path.stem)
def test_a_broken_config_is_refused_with_field_value_and_remedy(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = [line.removeprefix(REFUSED) for line in path.read_text().splitlines() if line.startswith(REFUSED)]
    assert expected, f"{path.name} says no reason"
    assert main(["check", str(path)]) == 2
    printed = capsys.readouterr()
    assert printed.err.removeprefix("syncline check: ").splitlines() == expected
    assert printed.out == ""


def test_a_good_file_prints_what_a_run_would_do(file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", file, "run.seed=5", "engine.num_threads=3"]) == 0
    printed = capsys.readouterr().out
    (tmp_path / "printed.yaml").write_text(printed)
    assert load(tmp_path / "printed.yaml") == load(file, ["run.seed=5", "engine.num_threads=3"])
    plan = [line.removeprefix("# ") for line in printed.splitlines() if line.startswith("# ")]
    names = [line.split(" (")[0] for line in plan if line.endswith(("(service)", "(job)"))]
    assert names == ["trajectories", "engine", "evaluation-before", "env:arithmetic", "learner", "evaluation-after"]
    assert any("-m syncline serve runs/x/config.yaml --port" in line for line in plan)
    assert any(line.startswith("  env: ") and "OMP_NUM_THREADS=3" in line for line in plan)
    assert not Path("runs/x").exists(), "checking leaves nothing behind"


def test_a_package_the_optimizer_lacks_is_a_reason_too(
    file: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(eight_bits, "find_spec", lambda name: None)
    assert main(["check", file, "learner.optimizer.moments=int8"]) == 2
    assert "learner.optimizer.moments: 'int8' needs the package torchao" in capsys.readouterr().err


def test_a_taken_port_is_a_reason_too(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    with lease_ports({"held": ("127.0.0.1", 0)}) as ports:
        assert main(["check", file, f"engine.port={ports['held']}"]) == 2
    assert f"engine.port: {ports['held']} on 127.0.0.1 is leased by another run" in capsys.readouterr().err


@pytest.mark.parametrize("overrides", [[], ["run.num_steps=0"]], ids=["good", "broken"])
def test_checking_imports_nothing_heavy(file: str, overrides: list[str]) -> None:
    code = (
        "import sys; from syncline.cli import main; main(sys.argv[1:])\n"
        f"print('imported:', *(name for name in {LEFT_OUT!r} if name in sys.modules))"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code, "check", file, *overrides],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert answer.stdout.splitlines()[-1:] == ["imported:"], answer.stdout[-200:] + answer.stderr
