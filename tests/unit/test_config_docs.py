"""`docs/config.md` and `docs/offline_config.md` say what the schemas say."""

import runpy
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_configuration_documents_are_up_to_date() -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "config_docs.py"))
    for path, text in script["documents"]().items():
        assert path.read_text() == text, f"{path.name}: run `.venv/bin/python scripts/config_docs.py`"
