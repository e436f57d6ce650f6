"""`syncline dpo`: files that are not there are named, and what its result depends on makes another stage."""

import json
import os
from pathlib import Path

import pytest

from syncline.cli import main
from syncline.offline import dpo
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


def test_another_chat_template_is_another_stage(file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["dpo", file, "--pairs", str(tmp_path / "pairs.jsonl")]
    assert main(words) == main(words) == 0
    assert len(list(tmp_path.glob("run/dpo-*"))) == 1
    (tmp_path / "model" / "chat_template.jinja").write_text("{{ messages[0] }}")
    assert main(words) == 0
    assert len(list(tmp_path.glob("run/dpo-*"))) == 2
