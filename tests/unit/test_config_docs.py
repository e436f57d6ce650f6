"""`docs/config.md` and `docs/offline_config.md` say what the schemas say."""

import runpy
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_configuration_documents_are_up_to_date() -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "config_docs.py"))
    for path, text in script["documents"]().items():
        assert path.read_text() == text, f"{path.name}: run `.venv/bin/python scripts/config_docs.py`"


def test_every_refusal_in_the_table_is_one_that_a_test_sees() -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "refusals_docs.py"))
    text = script["document"]()
    assert script["PAGE"].read_text() == text, "refusals.md: run `.venv/bin/python scripts/refusals_docs.py`"
    assert text.count("\n| `") > 100
