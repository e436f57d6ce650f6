"""Functions of the user's, by import path."""

import importlib
from collections.abc import Callable
from typing import Any

from syncline.errors import ConfigError


def imported(path: str, *, field: str) -> Callable[..., Any]:
    """The callable at `my_package.my_module:name`. Raises `ConfigError` naming the field."""
    module, _, attribute = path.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute) if attribute else None
    except (ImportError, AttributeError) as error:
        raise ConfigError([f"{field}: {path!r} does not import ({error}); put its folder on PYTHONPATH"]) from error
    if not callable(found):
        raise ConfigError([f"{field}: {path!r} is not a function; give my_package.my_module:my_function"])
    return found
