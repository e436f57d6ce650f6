"""`syncline dpo`: files that are not there are named, and what its result depends on makes another stage."""

import json
import os
from pathlib import Path

import pytest

from syncline.cli import main
from syncline.errors import ProcessDied
from syncline.launch.plan import Machine
from syncline.offline import dpo, engines
from syncline.offline.stage import Notes


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A pipeline file beside a model's folder, pairs, and a training that writes an empty adapter."""

    def train(config: object, task: object, notes: Notes) -> None:
        (notes.folder / "adapter").mkdir()
        (notes.folder / "adapter" / "adapter_config.json").write_text("{}")

    monkeypatch.setattr(dpo, "train_dpo", train)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / "model.safetensors").touch()
    (tmp_path / "model" / "chat_template.jinja").write_text("{{ messages }}")
    (tmp_path / "pairs.jsonl").write_text("{}\n")
    rows = {"name": "sums", "made": {}}
    values = {
        "run": {"dir": str(tmp_path / "run")},
        "model": {"path": str(tmp_path / "model"), "lora": {}},
        "collect": {"questions": rows},
        "eval": {"sets": [rows]},
    }
    (tmp_path / "pipeline.yaml").write_text(json.dumps(values))
    return str(tmp_path / "pipeline.yaml")


@pytest.mark.parametrize("option", ["--pairs", "--heldout", "--start"])
def test_what_is_not_there_is_named(option: str, file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = {"--pairs": str(tmp_path / "pairs.jsonl"), option: str(tmp_path / "mistyped")}
    assert main(["dpo", file, *(word for pair in given.items() for word in pair)]) == 2
    assert "mistyped" in capsys.readouterr().err
    assert not list(tmp_path.glob("run/dpo-*"))


def test_it_trains_on_the_gpu_that_is_named(file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    assert main(["dpo", file, "dpo.devices=[1]", "--pairs", str(tmp_path / "pairs.jsonl")]) == 0
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "5"


@pytest.mark.parametrize("verb", ["pipeline", "evaluate"])
def test_a_pipeline_is_on_that_gpu_too_and_its_engines_on_theirs(
    verb: str, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, ...]] = []

    def planned(*args: object, machine: Machine, **others: object) -> None:
        seen.extend((machine.gpus, (os.environ["CUDA_VISIBLE_DEVICES"],)))
        raise ProcessDied("no engine is started here")

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    monkeypatch.setattr(engines, "plan_servers", planned)
    assert main([verb, file, "dpo.devices=[1]", "engine.devices=[2]"]) == ProcessDied.exit_code
    assert seen == [("4", "5", "6"), ("5",)]


@pytest.mark.parametrize("verb", ["pipeline", "dpo", "evaluate"])
def test_gpus_that_dpo_cannot_use_are_refused_by_the_files_own_field(
    verb: str, file: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main([verb, file, "dpo.devices=[0,1]"]) == 2
    assert "dpo.devices: [0, 1] names 2 GPUs, and DPO trains on one" in capsys.readouterr().err
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    assert main([verb, file, "dpo.devices=[3]"]) == 2
    assert "dpo.devices: [3] is not among the 3 GPUs" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["pipeline", "dpo", "evaluate"])
def test_a_model_of_which_only_the_settings_are_there_is_refused(
    verb: str, file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As `syncline plan` leaves a hub's; its stages would be done again once the weights are there."""
    (tmp_path / "model" / "model.safetensors").unlink()
    assert main([verb, file, *(["--pairs", str(tmp_path / "pairs.jsonl")] if verb == "dpo" else [])]) == 2
    assert f"{tmp_path}/model: holds settings and no weights" in capsys.readouterr().err


def test_another_chat_template_is_another_stage(file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["dpo", file, "--pairs", str(tmp_path / "pairs.jsonl")]
    assert main(words) == main(words) == 0
    assert len(list(tmp_path.glob("run/dpo-*"))) == 1
    (tmp_path / "model" / "chat_template.jinja").write_text("{{ messages[0] }}")
    assert main(words) == 0
    assert len(list(tmp_path.glob("run/dpo-*"))) == 2
