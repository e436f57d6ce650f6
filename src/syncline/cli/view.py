"""`syncline view FILE`: one page of the groups in a file of `syncline process`, or in a run's `rollouts.jsonl`."""

import argparse
import json
import math
from pathlib import Path
from typing import Any

from syncline.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, help="groups as JSON lines")
    parser.add_argument("--out", type=Path, help="the page; default: the file's name with .html")
    parser.add_argument("--limit", type=int, default=200, help="groups shown")


def run(args: argparse.Namespace) -> int:
    print(write_page(args.file, args.out or args.file.with_suffix(".html"), limit=args.limit))
    return 0


def write_page(file: Path, out: Path, *, limit: int) -> Path:
    """Raises `ConfigError` naming the line that is no group."""
    from syncline.observe.files import text_lines
    from syncline.observe.page import write_rollouts_page

    try:
        lines = text_lines(file)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([f"{file}: cannot be read ({error}); give a file of JSON lines"]) from error
    return write_rollouts_page([_group(line, f"{file}:{n}") for n, line in enumerate(lines, 1)], out, limit=limit)


def _group(line: str, where: str) -> dict[str, Any]:
    """A group as people see it: a run has written it so; a whole one is made so."""
    from syncline.observe.sinks import group_for_people
    from syncline.trajectory.wire import Malformed, decode_group

    try:
        found = json.loads(line)
        if "prompt" in found:
            return found
        group = decode_group(line.encode())
    except (ValueError, TypeError, Malformed) as error:
        raise ConfigError([f"{where}: is no group ({error}); give a file that syncline wrote"]) from error
    return group_for_people(group, [math.nan] * len(group.rollouts))
