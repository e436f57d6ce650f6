"""What every route of ours shares, and how they join vLLM's."""

import asyncio
from collections.abc import Callable, Coroutine
from http import HTTPStatus
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from pydantic import BaseModel, ConfigDict

from syncline.engines.vllm import compat
from syncline.errors import EngineError, EngineGone, EngineTimeout, SyncError


class Body(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Order(Body):
    """What a bridge asks of an engine that it means to be paused, or to hold what it last told."""

    pause: int | None = None
    """The last pause that the engine told of: refused once a bridge has begun another. Absent: whichever is on."""


class Route(APIRoute):
    """Answers our own errors: by the time we get vLLM's app, its error handlers may be fixed. To a core that died, too,
    vLLM's answer is 500, as to a bad request; 503 sends whoever asks elsewhere until this process has ended. So it does
    those whom the server, as it ends, waits for no longer: it cancels them."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle, core_died = super().get_route_handler(), compat.core_died()

        async def answer(request: Request) -> Response:
            try:
                return await handle(request)
            except (EngineError, SyncError) as error:
                return JSONResponse({"error": str(error)}, status_code=_status(error))
            except core_died as error:
                told = f"the engine core died: {error}"
            except asyncio.CancelledError:
                told = "the engine is ending, or starting anew"
            return JSONResponse({"error": told}, status_code=HTTPStatus.SERVICE_UNAVAILABLE)

        return answer


def _status(error: EngineError | SyncError) -> HTTPStatus:
    if isinstance(error, EngineGone):
        return HTTPStatus.SERVICE_UNAVAILABLE
    return HTTPStatus.GATEWAY_TIMEOUT if isinstance(error, EngineTimeout) else HTTPStatus.CONFLICT


def add_routes(app: FastAPI, *routers: APIRouter) -> None:
    """Adds them and puts our `/health` before vLLM's."""
    for router in routers:
        app.include_router(router)
    health = [route for route in app.router.routes if getattr(route, "path", None) == "/health"]
    app.router.routes = [health[-1], *(r for r in app.router.routes if r not in health)]
