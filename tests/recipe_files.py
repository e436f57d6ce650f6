"""Recipes are programs, not a package: this loads one of their files as a module."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

RECIPES = Path(__file__).parents[1] / "recipes"


def load_recipe(path: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """`"demo/run.py"`, with its own folder on the path, as Python puts it there."""
    file = RECIPES / path
    monkeypatch.syspath_prepend(file.parent)
    name = "recipe_" + file.stem
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module
