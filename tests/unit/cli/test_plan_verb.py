"""`syncline plan` of files that say something of engines and ranks already: what it proposes is loaded over them."""

import json
from pathlib import Path

import pytest

from syncline.bench.shapes import SHAPES, VOCABULARY
from syncline.cli import main
from syncline.config import load

LISTED = "engine: {servers: [{devices: [0]}, {devices: [1]}, {devices: [2]}]}\nbridge: {name: broadcast}\n"
LISTED += "learner: {devices: [3]}\n"
SPLIT = "engine: {devices: [0, 1], tensor_parallel_size: 2}\nbridge: {name: shared}\n"
SPLIT += "learner: {devices: [0, 1], tensor_parallel_size: 2}\n"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    sizes = {**SHAPES["qwen2.5-0.5b"], "vocab_size": VOCABULARY, "model_type": "qwen2"}
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    return tmp_path / "run.yaml"


@pytest.mark.parametrize(("engines", "words", "num_gpus"), [(LISTED, [], 4), (SPLIT, ["--num-gpus", "4"], 4)])
def test_the_overrides_it_prints_load_over_the_file(
    file: Path, engines: str, words: list[str], num_gpus: int, capsys: pytest.CaptureFixture[str]
) -> None:
    file.write_text(
        f"run: {{dir: runs/x, num_steps: 4, groups_per_step: 16}}\nmodel: {{path: {file.parent}, max_length: 512}}\n"
        f"sampling: {{max_tokens: 256}}\nenvironments: [{{task: arithmetic}}]\n{engines}"
    )
    assert main(["plan", str(file), *words]) == 0
    printed = capsys.readouterr().out
    assert f"; {num_gpus} × h200" in printed
    overrides = printed.partition("as overrides:")[2].split("with learner")[0].split()
    config = load(file, overrides)
    assert len({*config.engine.devices, *config.learner.devices}) == num_gpus
    table = printed.partition("a learner's GPU")[0]
    assert "broadcast" in table and "shared" in table, "what the file says of ranks rules out none"


def test_no_gpus_are_no_default(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file.write_text(
        "run: {dir: runs/x, num_steps: 4, groups_per_step: 16}\nmodel: {path: m}\nsampling: {max_tokens: 256}\n"
        "environments: []\n"
    )
    assert main(["plan", str(file), "--num-gpus", "0"]) == 2
    assert "--num-gpus: 0 must be above 0" in capsys.readouterr().err
