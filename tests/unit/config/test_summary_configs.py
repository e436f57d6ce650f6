"""The summary configurations are whole: their fields and rules, and every reward they weigh, exist."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from syncline.config import load
from syncline.envs.registry import build_environment
from syncline.envs.scoring import Score
from syncline.envs.tasks.summary import Summary

ROOT = Path(__file__).parents[3]
FILES = sorted((ROOT / "configs/train/grpo").glob("summary_*.yaml"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("summary")
    script = ROOT / "scripts/summary_dataset.py"
    subprocess.run([sys.executable, str(script), str(folder), "--train", "16", "--heldout", "4"], check=True)
    return folder


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_file_loads_and_its_environment_scores_what_was_drawn(file: Path, rows: Path) -> None:
    config = load(str(file), [])
    [environment] = config.environments
    args: dict[str, Any] = {key: str(v).replace("data/summary", str(rows)) for key, v in environment.args.items()}
    args["weights"] = environment.args["weights"]
    built: Any = build_environment(environment.model_copy(update={"args": args}), position=0, seed=0)
    assert isinstance(built, Summary)
    for index in range(16):
        task = built.task(index)
        right = task.reference
        said = right if right == "无关图片" else f"<DOMAIN={task.domain}>, <TASK=SUMMARY>\n{right}"
        best, worst = built.score(task, said), built.score(task, "nothing to see")
        assert isinstance(best, Score)
        assert isinstance(worst, Score)
        assert best.reward > worst.reward
        assert best.parts["schema_tree"] in (0.0, 1.0)


def test_both_files_are_there() -> None:
    assert [file.stem for file in FILES] == ["summary_1024", "summary_1024_attr_key_recall"]
