"""`docs/refusals.md` from the cases that tests refuse, so that the table cannot differ: run it after changing one."""

import runpy
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

from syncline.config import load
from syncline.errors import ConfigError

ROOT = Path(__file__).resolve().parent.parent
BROKEN = ROOT / "tests" / "golden" / "broken_configs"
MS_SWIFT = ROOT / "tests" / "unit" / "config" / "test_ms_swift.py"
PAGE = ROOT / "docs" / "refusals.md"
REFUSED = "# refused: "
INTRODUCTION = """\
# What is refused

<!-- Written by scripts/refusals_docs.py from tests/golden/broken_configs and tests/unit/config/test_ms_swift.py. -->

What a configuration is refused for, in the words it is told, each with a file that a test refuses; all faults of a
file are listed at once. `syncline check FILE` says them before anything starts. What a model's own config.json speaks
against (a quantised base, a vision tower) is in [bridges.md](bridges.md#a-quantised-base),
[gpt_oss.md](gpt_oss.md#what-vllm-cannot-do) and [servers.md](servers.md#several-hosts).
"""


def main() -> None:
    PAGE.write_text(document())


def document() -> str:
    files = sorted(BROKEN.glob("*.yaml"))
    lines = [line for file in files for line in file.read_text().splitlines() if line.startswith(REFUSED)]
    own, theirs = "\n".join(_table(line.removeprefix(REFUSED) for line in lines)), "\n".join(_table(_of_ms_swift()))
    return f"{INTRODUCTION}\n## Files of ours\n\n{own}\n\n## Files of ms-swift\n\n{theirs}\n"


def _of_ms_swift() -> Iterator[str]:
    """What each case of the tests is told, in full."""
    test: dict[str, Any] = runpy.run_path(str(MS_SWIFT))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.yaml"
        for overrides, fault in test["WRONG"]:
            path.write_text(yaml.safe_dump(test["file"](overrides)))
            try:
                load(path)
            except ConfigError as refused:
                yield from (told for told in refused.faults if fault in told)


def _table(faults: Iterable[str]) -> Iterator[str]:
    yield from ("| field | |", "|---|---|")
    for field, _, told in sorted({fault.partition(": ") for fault in faults}):
        yield f"| `{field}` | {_cell(told)} |"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").replace("<", "\\<").split())


if __name__ == "__main__":
    main()
