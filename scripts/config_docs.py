"""`docs/config.md` from the configuration's schema, so that the two cannot differ: run it after changing a field."""

import json
import types
from collections.abc import Iterator
from inspect import cleandoc
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from syncline.config.offline import OfflineConfig
from syncline.config.schema import RunConfig

DOCS = Path(__file__).resolve().parent.parent / "docs"
SIGNS = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}
INTRODUCTION = """\
# Configuration

<!-- Written by scripts/config_docs.py from src/syncline/config/schema.py; edit that. -->

A run is one YAML file; `a.b=c` on the command line sets a field over it, list items by their index
(`environments.0.weight=2`). Unknown keys are refused by name, and `syncline check FILE` lists what is wrong, or prints
every value and the processes that the run would start. Nothing rewrites a value after loading: what `check` prints is
what runs.
"""
OFFLINE_INTRODUCTION = """\
# The pipeline file

<!-- Written by scripts/config_docs.py from src/syncline/config/offline.py and offline_collect.py; edit these. -->

What `syncline pipeline`, `collect`, `pairs`, `dpo` and `evaluate` read; [offline.md](offline.md) tells what they do. As
in a run's file, unknown keys are refused by name, all faults are listed, and `a.b=c` on the command line sets a field.
`model`, `engine` and `bridge` are those of [config.md](config.md).
"""
TOLD_THERE = ("model", "engine", "bridge")


def main() -> None:
    for path, text in documents().items():
        path.write_text(text)


def documents() -> dict[Path, str]:
    own = [(n, m) for n, m in _sections("", OfflineConfig) if n.partition(".")[0] not in TOLD_THERE]
    return {
        DOCS / "config.md": _document(INTRODUCTION, [*_sections("", RunConfig)]),
        DOCS / "offline_config.md": _document(OFFLINE_INTRODUCTION, own),
    }


def _document(introduction: str, sections: list[tuple[str, type[BaseModel]]]) -> str:
    lines = "\n".join(line for name, model in sections for line in _section(name, model))
    return f"{introduction}\n{lines}\n"


def _sections(name: str, model: type[BaseModel]) -> Iterator[tuple[str, type[BaseModel]]]:
    """Every section below `model`, depth first, under its dotted name."""
    for field_name, field in model.model_fields.items():
        if inner := _model_of(field.annotation):
            dotted = f"{name}.{field_name}" if name else field_name
            dotted += "[]" if get_origin(field.annotation) is tuple else ""
            yield dotted, inner
            yield from _sections(dotted, inner)


def _model_of(annotation: Any) -> type[BaseModel] | None:
    candidates = (annotation, *get_args(annotation))
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)


def _section(name: str, model: type[BaseModel]) -> list[str]:
    own = [(n, f) for n, f in model.model_fields.items() if _model_of(f.annotation) is None]
    inner = [f"`{name}.{n}`" for n, f in model.model_fields.items() if _model_of(f.annotation)]
    described = [cleandoc(model.__doc__), ""] if model.__doc__ else []
    below = [f"Below it: {', '.join(inner)}.", ""] if inner else []
    rows = [f"| `{n}` | {_type(f)} | {_default(f)} | {_cell(f.description)} |" for n, f in own]
    return [f"## `{name}`", "", *described, *below, "| field | type | default | |", "|---|---|---|---|", *rows, ""]


def _cell(text: str | None) -> str:
    return " ".join((text or "").replace("|", "\\|").split())


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "**required**"
    value = field.get_default(call_default_factory=True)
    return "" if value is None else f"`{json.dumps(value)}`"


def _type(field: FieldInfo) -> str:
    limits = [f"{sign} {getattr(m, name)}" for m in field.metadata for name, sign in SIGNS.items() if hasattr(m, name)]
    return " ".join([_name(field.annotation), ", ".join(limits)]).strip()


def _name(annotation: Any) -> str:
    """`tuple[int, ...]` → `list of int`, for people who write YAML."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _name(arguments[0])
    if origin is Literal:
        return " \\| ".join(f"`{a}`" for a in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(_name(a) for a in arguments if a is not type(None))
    if origin is tuple:
        many = "list" if arguments[-1] is Ellipsis else str(len(arguments))
        return f"{many} of {_name(arguments[0])}"
    return "mapping" if origin is dict else annotation.__name__


if __name__ == "__main__":
    main()
