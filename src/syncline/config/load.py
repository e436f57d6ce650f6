"""YAML + `a.b=c` → `RunConfig`, with every fault in one error. A file of ms-swift is recognised and translated."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from syncline.config.ms_swift import is_ms_swift, translate
from syncline.config.rules import broken_rules
from syncline.config.schema import RunConfig
from syncline.errors import ConfigError

S = TypeVar("S", bound=BaseModel)
log = logging.getLogger(__name__)


def load(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a YAML file, applies `a.b=c` overrides in order, validates. Raises `ConfigError` with all faults."""
    values = _read(Path(path))
    if is_ms_swift(values) or ("extends" in values and "run" not in values):
        return _load_ms_swift(Path(path), values, overrides)
    _apply_all(values, overrides)
    return resolve(values)


def read_values(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """What the file and the overrides say, unchecked."""
    values = _read(Path(path))
    _apply_all(values, overrides)
    return values


def _load_ms_swift(path: Path, values: dict[str, Any], overrides: Sequence[str]) -> RunConfig:
    """Overrides of their sections change the file, others what it was translated to. A fault names both paths."""
    values = _with_bases(path, values)
    if not is_ms_swift(values):
        raise ConfigError([f"{path}: extends: is for files of ms-swift, and no file here has their section rlhf"])
    own = [override for override in overrides if override.partition(".")[0] in RunConfig.model_fields]
    _apply_all(values, [override for override in overrides if override not in own])
    found = translate(values)
    if found.faults:
        raise ConfigError(found.faults)
    _apply_all(found.values, own)
    try:
        config = resolve(found.values)
    except ConfigError as error:
        raise ConfigError([_traced(fault, found.origins) for fault in error.faults]) from error
    for note in found.notes:
        log.warning("%s", note)
    return config


def _traced(fault: str, origins: Mapping[str, str]) -> str:
    ours = fault.partition(":")[0]
    return f"{origins[ours]} ({ours}){fault[len(ours) :]}" if ours in origins else fault


def _with_bases(path: Path, values: dict[str, Any], seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The files that `extends` names, relative to this one, merged in order, and this one over them."""
    here = path.resolve()
    if here in seen:
        raise ConfigError([f"{path}: extends: comes back to itself; leave one of {[p.name for p in seen]} out"])
    bases = values.pop("extends", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ConfigError([f"{path}: extends: {bases!r} must be a file's name, or a list of them"])
    merged: dict[str, Any] = {}
    for base in bases:
        other = path.parent / base
        merged = _merged(merged, _with_bases(other, _read(other), (*seen, here)))
    return _merged(merged, values)


def _merged(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    result = {**under, **over}
    for name in under.keys() & over.keys():
        if isinstance(under[name], dict) and isinstance(over[name], dict):
            result[name] = _merged(under[name], over[name])
    return result


def _read(path: Path) -> dict[str, Any]:
    try:
        values = _parsed(path.read_bytes())
    except OSError as error:
        raise ConfigError([f"{path}: cannot be read ({error.strerror}); give the path of a YAML file"]) from error
    except yaml.YAMLError as error:
        raise ConfigError([f"{path}: not valid YAML: {error}"]) from error
    if not isinstance(values, dict):
        raise ConfigError(
            [f"{path}: holds a {type(values).__name__}; a run file is a mapping with the keys run, model, …"]
        )
    return values


def _parsed(text: str | bytes) -> Any:
    """Raises `yaml.YAMLError`, also for what is no value where YAML's own types say it is one: 2024-13-45, `0x_`."""
    try:
        return yaml.load(text, Loader=_StrictLoader)
    except (ValueError, RecursionError) as error:
        raise yaml.YAMLError(str(error)) from error


def _apply_all(values: dict[str, Any], overrides: Sequence[str]) -> None:
    if faults := [fault for override in overrides for fault in _apply(values, override)]:
        raise ConfigError(faults)


def resolve(values: dict[str, Any]) -> RunConfig:
    """Validates plain values. Raises `ConfigError` listing every fault, field faults and cross-section faults alike."""
    config = validated(RunConfig, values)
    faults = broken_rules(config)
    if faults:
        raise ConfigError(faults)
    return config


def validated(schema: type[S], values: dict[str, Any]) -> S:
    """Raises `ConfigError` listing every fault of a field, each by its dotted name."""
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        raise ConfigError([_explain(e, schema) for e in error.errors()]) from error


def _apply(values: dict[str, Any], override: str) -> list[str]:
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")):
        return [f"override {override!r}: write it as section.field=value, such as run.seed=1"]
    *parents, last = key.split(".")
    here: Any = values
    for part in parents:
        here = _child(here, part)
        if here is None:
            return [f"override {override!r}: {part!r} is not a section with fields"]
    try:
        value = _parsed(text)
    except yaml.YAMLError:
        return [f"override {override!r}: {text!r} is not a YAML value; quote it"]
    if isinstance(here, list):
        if not last.isdecimal() or int(last) >= len(here):
            return [f"override {override!r}: {last!r} is not an index below {len(here)}"]
        here[int(last)] = value
    else:
        here[last] = value
    return []


def _child(here: Any, part: str) -> Any:
    """The mapping or list under `part`, made when a mapping lacks it; `None` when there is none."""
    if isinstance(here, list):
        found = here[int(part)] if part.isdecimal() and int(part) < len(here) else None
    else:
        if here.get(part) is None:
            here[part] = {}
        found = here[part]
    return found if isinstance(found, dict | list) else None


def _explain(error: Any, schema: type[BaseModel]) -> str:
    where = ".".join(str(part) for part in error["loc"]) or "(top level)"
    if error["type"] == "extra_forbidden":
        return f"{where}: unknown key (value {error['input']!r}); {_nearest(error['loc'], schema)}"
    if error["type"] == "missing":
        return f"{where}: required, but missing; add it"
    if error["type"] == "value_error":
        return f"{where}: {error['ctx']['error']}"
    remedy = error["msg"][0].lower() + error["msg"][1:]
    if error["type"] == "literal_error" and isinstance(error["input"], bool):
        remedy += ", in quotes: YAML takes a bare on, off, yes or no for true or false"
    return f"{where}: {error['input']!r} is not usable: {remedy}"


def _nearest(loc: tuple[str | int, ...], schema: type[BaseModel]) -> str:
    import difflib

    fields = _fields_at(loc[:-1], schema)
    close = difflib.get_close_matches(str(loc[-1]), fields, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(fields)}"


def _fields_at(loc: tuple[str | int, ...], schema: type[BaseModel]) -> list[str]:
    from typing import get_args

    model: Any = schema
    for part in loc:
        if isinstance(part, int):
            continue
        annotation = model.model_fields[part].annotation
        candidates = [annotation, *get_args(annotation)]
        model = next(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))
    return list(model.model_fields)


class _StrictLoader(yaml.SafeLoader):
    """YAML that refuses a key written twice, and reads `1e-6` as the number people mean."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Here a mapping is as it was written: nothing is merged into it yet (`<<: *base`)."""
        node = super().compose_mapping_node(anchor)
        seen: set[tuple[str, str]] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if (key.tag, key.value) in seen:
                fault = f"key {key.value!r} is written twice"
                raise yaml.constructor.ConstructorError(None, None, fault, key.start_mark)
            seen.add((key.tag, key.value))
        return node


def _register_scientific_floats() -> None:
    import re

    pattern = re.compile(r"^[-+]?(?:\d+(?:\.\d*)?|\.\d+)[eE][-+]?\d+$")
    _StrictLoader.yaml_implicit_resolvers = {k: list(v) for k, v in yaml.SafeLoader.yaml_implicit_resolvers.items()}
    for first in "-+.0123456789":
        _StrictLoader.yaml_implicit_resolvers.setdefault(first, []).insert(0, ("tag:yaml.org,2002:float", pattern))


_register_scientific_floats()
