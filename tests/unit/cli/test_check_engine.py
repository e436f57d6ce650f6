"""`syncline check --engine`: what the installed vLLM would refuse, by its field; no model is loaded."""

import os

import pytest
from real_engine import make_tiny_model

from syncline.cli import main
from syncline.config import resolve
from syncline.engines.vllm import compat
from syncline.engines.vllm.arguments import _refused

VALUES = {
    "run": {"dir": "x", "num_steps": 1, "groups_per_step": 1},
    "model": {"path": "m", "max_length": 64},
    "sampling": {"max_tokens": 8},
    "environments": [{"task": "arithmetic"}],
}


@pytest.mark.parametrize(
    ("told", "fields"),
    [
        ("unrecognized arguments: --colour red", "engine.extra.colour: 'red' is refused by vLLM 0.99"),
        ("unrecognized arguments: --no-dim-lights", "engine.extra.dim_lights: False is refused by vLLM 0.99"),
        ("Unknown attention backend: 'X'.", "engine.extra.attention_backend: 'X' is refused by vLLM 0.99"),
        ("--colour and --dim-lights", "engine.extra.colour: 'red', engine.extra.dim_lights: False is refused"),
        ("the model has 8 heads", "engine: vLLM 0.99 refuses what it would be started with: the model has 8 heads"),
    ],
)
def test_the_field_is_named(told: str, fields: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "vllm_version", lambda: "0.99")
    extra = {"colour": "red", "dim_lights": False, "attention_backend": "X"}
    fault = str(_refused(resolve(VALUES | {"engine": {"extra": extra}}), told))
    assert fault.startswith(fields)
    assert fault.endswith(told)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("check")
    path = folder / "run.yaml"
    path.write_text(
        f"run: {{dir: {folder / 'run'}, num_steps: 1, groups_per_step: 1}}\n"
        f"model: {{path: {make_tiny_model(folder / 'model')}, max_length: 64}}\n"
        "sampling: {max_tokens: 8}\nenvironments: [{task: arithmetic}]\n"
        "engine: {device: cpu}\nlearner: {device: cpu}\n"
    )
    return str(path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("option", "fault"),
    [
        ("extra={max_num_batched_tokens: 512}", None),
        ("extra={max_num_batched_tokens: 128}", "must be greater than or equal to max_num_seqs (256)"),
        ("extra={colour: red}", "engine.extra.colour: 'red' is refused by vLLM"),
        ("extra={kv_cache_dtype: fp9}", "engine.extra.kv_cache_dtype: 'fp9' is refused by vLLM"),
        ("extra={attention_backend: NONSENSE}", "engine.extra.attention_backend: 'NONSENSE' is refused by vLLM"),
        ("tensor_parallel_size=3", "refuses what it would be started with: "),
    ],
)
def test_what_vllm_refuses_is_refused_without_its_usage(
    file: str, option: str, fault: str | None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", os.environ.copy())
    assert main(["check", file, "--engine", f"engine.{option}"]) == (2 if fault else 0)
    said = capsys.readouterr().err
    assert fault is None or fault in said
    assert "[--optimization-level" not in said
