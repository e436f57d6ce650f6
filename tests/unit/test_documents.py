"""What the documents show works as shown."""

import asyncio
import importlib
import re
from pathlib import Path

import pytest
import yaml

from syncline.config import load, resolve
from syncline.config.offline import load_offline
from syncline.config.schema import Environment
from syncline.envs.registry import build_environment
from syncline.testing import ScriptedPolicy

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]


def blocks(document: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", document.read_text(), re.MULTILINE | re.DOTALL)


def test_run_in_the_readme_is_a_valid_configuration() -> None:
    run, change = (yaml.safe_load(block) for block in blocks(ROOT / "README.md", "yaml"))
    assert resolve(run).model.path == run["model"]["path"]
    assert resolve(run | change).model.path == change["model"]["path"]


def test_run_in_the_migration_page_is_a_valid_configuration() -> None:
    [run] = blocks(ROOT / "docs" / "migrating.md", "yaml")
    assert resolve(yaml.safe_load(run)).environments == ()


@pytest.mark.parametrize("file", [*(ROOT / "configs").glob("*.yaml")], ids=lambda path: path.name)
def test_shipped_configuration_is_valid(file: Path) -> None:
    is_run = "environments" in yaml.safe_load(file.read_text())
    assert load(file).environments if is_run else load_offline(file).eval.sets


def test_environment_in_the_guide_can_be_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    guide = ROOT / "docs" / "extending.md"
    (tmp_path / "reversal.py").write_text(blocks(guide, "python")[0])
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    (config,) = yaml.safe_load(blocks(guide, "yaml")[0])["environments"]
    environment = build_environment(Environment(**config), position=0, seed=3)
    task = environment.task(0)
    rewards = []
    for answer in (task[::-1], "wrong"):
        rollouts = asyncio.run(environment.rollouts(task, 2, ScriptedPolicy(lambda seen, said=answer: said)))
        rewards.append([rollout.reward for rollout in rollouts])
    assert len(task) == 6 and rewards == [[1.0, 1.0], [0.0, 0.0]]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)\)", document.read_text())
    assert [target for target in targets if not (document.parent / target).exists()] == []


def test_documents_name_files_that_exist() -> None:
    told = {name for document in DOCUMENTS for name in re.findall(r"`((?:\w+/)+[\w.]+\.\w+)`", document.read_text())}
    roots = (ROOT, ROOT / "src" / "syncline")
    assert {name for name in told if not any((root / name).exists() for root in roots)} == set()


def test_every_test_that_a_document_names_is_there() -> None:
    sources = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    named = {name for document in DOCUMENTS for name in re.findall(r"`(test_\w+)`", document.read_text())}
    assert len(named) > 15
    assert {name for name in named if f"def {name}(" not in sources} == set()
