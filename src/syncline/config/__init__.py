"""What a run is: frozen pydantic models, loaded from YAML + `a.b=c`. Imports without torch."""

from syncline.config.load import load, resolve
from syncline.config.schema import RunConfig

__all__ = ["RunConfig", "load", "resolve"]
