"""Built-ins and import paths; every way to get one wrong, told by field, value and remedy."""

import re
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from syncline.config.schema import Environment as EnvironmentConfig
from syncline.envs.registry import build_environment
from syncline.envs.tasks.arithmetic import Arithmetic
from syncline.errors import ConfigError

OWN = """
    from syncline.envs.single_turn import Score, SingleTurn
    from syncline.types import Message

    class Reverse(SingleTurn):
        name = "reverse"

        def __init__(self, length, *, extra=None):
            self.length = length + 0

        def task(self, index, *, split="train"):
            return str(index)

        def prompt(self, task):
            return [Message("user", task)]

        def score(self, task, text):
            return Score(float(text == task[::-1]))

    class NoScore(SingleTurn):
        name = "no score"

        def task(self, index, *, split="train"): ...
        def prompt(self, task): ...

    class Nothing:
        def task(self, index, *, split="train"): ...

    class NotAsync(Nothing):
        name = "not async"
        def rollouts(self, task, num_rollouts, policy): ...

    number = 3
"""


@pytest.fixture(autouse=True)
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_environments.py").write_text(textwrap.dedent(OWN))
    (tmp_path / "own_broken.py").write_text("import a_package_nobody_has")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("own_environments", "own_broken"):
        monkeypatch.delitem(sys.modules, name, raising=False)


def build(task: str, *, position: int = 0, seed: int = 5, **args: Any) -> Any:
    return build_environment(EnvironmentConfig(task=task, args=args), position=position, seed=seed)


def test_built_in_gets_the_runs_seed_unless_args_have_their_own():
    assert isinstance(build("arithmetic"), Arithmetic)
    assert build("arithmetic").seed == 5
    assert build("arithmetic", seed=9).seed == 9


def test_import_path_is_built_with_its_args():
    environment = build("own_environments:Reverse", length=4)
    assert (environment.name, environment.length) == ("reverse", 4)


@pytest.mark.parametrize(
    ("task", "words"),
    [
        ("arithmetics", "'arithmetics' is not a built-in (arithmetic, gsm8k, judged, "),
        ("own_environments:", "'own_environments:' is not a built-in"),
        ("no_such_module:Thing", "module 'no_such_module' does not import (No module named 'no_such_module'); install"),
        ("own_broken:Thing", "module 'own_broken' does not import (No module named 'a_package_nobody_has')"),
        ("own_environments:Revers", "module 'own_environments' has no class 'Revers'"),
        ("own_environments:number", "module 'own_environments' has no class 'number'"),
        ("own_environments:NoScore", "'own_environments:NoScore' does not define score"),
        ("own_environments:Nothing", "is not an Environment: Nothing lacks a str `name`, rollouts()"),
        ("own_environments:NotAsync", "rollouts() is not a coroutine"),
    ],
)
def test_unusable_task_is_named_with_a_remedy(task: str, words: str):
    with pytest.raises(ConfigError, match=rf"^environments\.2\.task: .*{re.escape(words)}"):
        build(task, position=2)


@pytest.mark.parametrize(
    ("task", "args"),
    [
        ("arithmetic", {"levels": [{"digits": "2"}]}),
        ("arithmetic", {"levels": [{"digits": 2.5}]}),
        ("arithmetic", {"weights": ["correct"]}),
        ("judged", {"judge": {"url": "http://x", "model": "m", "timeout_seconds": "60"}}),
    ],
)
def test_args_of_another_type_are_refused_with_their_values(task: str, args: dict):
    with pytest.raises(ConfigError, match=r"^environments\.0\.args[:.].*(levels|weights|judge)"):
        build_environment(EnvironmentConfig(task=task, args=args), position=0, seed=0)


def test_args_the_constructor_does_not_take_are_explained():
    with pytest.raises(
        ConfigError, match=r"^environments\.1\.args: .*missing a required argument: 'length'.*takes \(length"
    ):
        build("own_environments:Reverse", position=1)
    with pytest.raises(ConfigError, match=r"^environments\.0\.args: .*unexpected keyword argument 'digits'"):
        build("arithmetic", digits=3)


def test_constructors_own_complaint_gets_its_place():
    with pytest.raises(ConfigError, match=r"^environments\.3\.args\.operations: \['/'\] must be one or more of"):
        build("arithmetic", position=3, operations=["/"])


def test_type_error_inside_a_constructor_is_not_blamed_on_the_config():
    with pytest.raises(TypeError, match="can only concatenate str"):
        build("own_environments:Reverse", length="four")
