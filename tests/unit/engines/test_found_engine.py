"""The engine that a bridge file names must be the one that wrote it, and vLLM must know syncline's plugin."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from real_engine import run_values
from torch import nn

from syncline.bridges.bridge_file import find_bridge_file, write_bridge_file
from syncline.bridges.handles import export_views, move_to_memory_file
from syncline.bridges.receipt import whole
from syncline.engines.found import FoundEngine
from syncline.engines.vllm import plugin
from syncline.errors import EngineError, SyncError


def found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, version: str, kind: str) -> FoundEngine:
    """A file of an engine of version 0.32.0 with one parameter, and what answers at its URL."""
    weight = nn.Parameter(torch.zeros(4, 3))
    handles = export_views(
        [("w", whole(weight.data))], memory_file=move_to_memory_file([weight]), vllm_version="0.32.0"
    )
    path = str(write_bridge_file(str(tmp_path / "it.json"), url="http://127.0.0.1:1", model="m", handles=[handles]))
    engine = FoundEngine(find_bridge_file(path, model="m", device=torch.device("cpu")), timeout_seconds=1)
    answers: dict[str, Any] = {"/health": {"version": version}, "/syncline/parameters": {"parameters": {"w": kind}}}
    monkeypatch.setattr(engine, "_call", lambda method, path: answers[path])
    return engine


def test_handles_come_from_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = found(tmp_path, monkeypatch, version="0.32.0", kind="float32[4, 3]:a digest")
    assert list(engine.export()[0]["tensors"]) == ["w"]


@pytest.mark.parametrize(
    ("version", "kind", "told"),
    [
        ("0.26.0", "float32[4, 3]:0", "vllm_version 0.32.0 is not engine at http://127.0.0.1:1's 0.26.0"),
        ("0.32.0", "float32[4, 4]:0", "model [0-9a-f]{64} is not engine at http://127.0.0.1:1's [0-9a-f]{64}"),
    ],
)
def test_an_engine_that_did_not_write_the_file_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, kind: str, told: str
) -> None:
    engine = found(tmp_path, monkeypatch, version=version, kind=kind)
    with pytest.raises(SyncError, match=rf"it\.json: {told}; start the engine again"):
        engine.export()


def test_an_engine_without_the_plugin_says_so_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    plugin.refuse_unregistered()
    monkeypatch.setattr(plugin, "entry_points", lambda group: ())
    with pytest.raises(EngineError, match=r"entry point vllm\.general_plugins = .*not installed; run `make setup`"):
        plugin.refuse_unregistered()


def test_an_engine_whose_plugins_are_narrowed_without_ours_ends_before_vllm_is_imported(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run_values(tmp_path / "model", tmp_path / "run")))
    argv = [sys.executable, "-m", "syncline", "serve", str(tmp_path / "run.yaml"), "--port", "1"]
    done = subprocess.run(argv, env=os.environ | {"VLLM_PLUGINS": "other"}, capture_output=True, text=True)
    assert done.returncode == EngineError.exit_code
    assert done.stderr == "syncline serve: VLLM_PLUGINS = 'other' leaves out syncline; add it, or unset VLLM_PLUGINS\n"
