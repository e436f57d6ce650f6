"""What `/openapi.json` says of bodies: the routes read and check them themselves, so FastAPI knows nothing of them."""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from syncline.trajectory import wire

_REFERENCE = "#/components/schemas/{model}"
_GROUP = "RolloutGroup"


def takes(model: type[BaseModel] | None, *, many: bool = False) -> dict[str, Any]:
    """Keywords of a route whose body is a `model`, or a list of them; without one it is a group of our own wire."""
    name = _GROUP if model is None else model.__name__
    reference = {"$ref": _REFERENCE.format(model=name)}
    schema = {"type": "array", "items": reference} if many else reference
    return {"openapi_extra": {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}}


def describe(app: FastAPI, models: list[type[BaseModel]]) -> None:
    """Adds the schemas that `takes` refers to."""

    def openapi() -> dict[str, Any]:
        found = get_openapi(title=app.title, version=app.version, routes=app.routes)
        _, schemas = models_json_schema([(model, "validation") for model in models], ref_template=_REFERENCE)
        group = wire.group_schema(_REFERENCE)
        parts = found.setdefault("components", {}).setdefault("schemas", {})
        parts |= schemas.get("$defs", {}) | group.pop("$defs", {}) | {_GROUP: group}
        return found

    app.openapi = openapi
