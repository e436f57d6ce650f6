"""How a worker answers: `{"value": ...}`, or `{"fault": ...}` when this rank cannot do it.

vLLM would carry an exception to the caller without its type, or end the engine.
"""

from collections.abc import Callable
from typing import Any

from syncline.errors import SyncError


def answer(call: Callable[[], Any]) -> dict[str, Any]:
    try:
        return {"value": call()}
    except SyncError as error:
        return {"fault": str(error)}
