"""`syncline env new`: a small environment that works, with a test that passes, to be changed into one's own."""

import keyword
import re
from pathlib import Path

from syncline.errors import ConfigError

TEMPLATES = Path(__file__).with_name("templates")


def write_environment(name: str, folder: Path) -> list[Path]:
    """`name.py` and `test_name.py`. Raises `ConfigError` for a name that is none, or a file that is there already."""
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name):
        raise ConfigError([f"name: {name!r} must be a Python module's name in lower case, such as word_sums"])
    written = {folder / f"{name}.py": "environment.txt", folder / f"test_{name}.py": "test.txt"}
    if taken := [str(path) for path in written if path.exists()]:
        raise ConfigError([f"name: {', '.join(taken)} is there already; choose another name or folder"])
    folder.mkdir(parents=True, exist_ok=True)
    for path, template in written.items():
        text = (TEMPLATES / template).read_text(encoding="utf-8")
        path.write_text(text.replace("@name@", name).replace("@title@", class_name(name)), encoding="utf-8")
    return list(written)


def class_name(name: str) -> str:
    """`word_sums` → `WordSums`."""
    return "".join(part.capitalize() for part in name.split("_"))
