"""`docs/config.md` says what the schema says."""

import runpy
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_configuration_document_is_up_to_date() -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "config_docs.py"))
    told = (ROOT / "docs" / "config.md").read_text()
    assert told == script["document"](), "run `.venv/bin/python scripts/config_docs.py`"
