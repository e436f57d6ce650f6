"""Adapters over HTTP: two calls of the `lora` bridge, and `/lora/*` for loading one by hand.

A bridge stages (nothing samples from it yet) and then switches; neither needs a pause. An adapter loaded by hand serves
at once, but what is sampled from it has no policy version, so no learner trains on it; the next switch replaces it.
"""

import json
from http import HTTPStatus
from pathlib import Path
from typing import Any

from fastapi import APIRouter, HTTPException
from pydantic import Field

from syncline.bridges.receipt import model_digest
from syncline.engines.vllm.adapters import Adapter
from syncline.engines.vllm.routes import Body, Order, Route
from syncline.engines.vllm.served import Served
from syncline.errors import EngineError, SyncError
from syncline.protocols import Receipt

LOAD_TIMEOUT_SECONDS = 300.0
"""For requests under an adapter whose slot a load by hand needs."""


class SourceBody(Body):
    """`bridges.adapter.AdapterLayout.text`, and where a `bridges.carriers.Carrier` put it."""

    layout: str
    source: dict[str, Any]


class StageBody(Order):
    adapter: SourceBody
    policy_version: int = Field(ge=0)
    timeout_seconds: float = Field(gt=0)


class SwitchBody(Order):
    expected: Receipt
    resume: bool


class LoadBody(Body):
    adapter_path: str
    adapter_name: str | None = None


def adapter_routes(served: Served) -> APIRouter:
    router = APIRouter(route_class=Route)

    @router.get("/syncline/adapters")
    async def adapters() -> dict[str, Any]:
        served.adapters.refuse_without()
        ranks = await served.each_rank("syncline_adapters")
        modules = {name: size for rank in ranks for name, size in rank["modules"].items()}
        return ranks[0] | {"modules": modules, "whereabouts": [rank["whereabouts"] for rank in ranks]}

    @router.post("/syncline/stage")
    async def stage(body: StageBody) -> dict[str, Any]:
        served.refuse_late(body.pause)
        served.refuse_backwards(body.policy_version)
        adapter, sent = served.adapters.new(f"policy-v{body.policy_version}"), body.adapter
        await _load(served, adapter, "syncline_stage", sent.layout, sent.source, timeout_seconds=body.timeout_seconds)
        return {"parameters": adapter.parameters}

    @router.post("/syncline/switch")
    async def switch(body: SwitchBody) -> dict[str, Any]:
        served.refuse_late(body.pause)
        version, digest = body.expected.policy_version, body.expected.digest
        served.refuse_backwards(version)
        base = served.base_parameters()
        held = reversed(served.adapters.held)
        proved = next((a for a in held if model_digest(base | a.parameters) == digest), None)
        if proved is None:
            raise EngineError(f"no adapter here has digest {digest[:12]} with the base; stage it first")
        served.adapters.policy, served.adapters.by_hand = proved, None
        served.gate.policy_version = version
        served.sample_from_current()
        if body.resume:
            await served.resume(body.expected)
        return served.receipt()

    return router


async def _load(served: Served, adapter: Adapter, method: str, *content: Any, timeout_seconds: float) -> None:
    """Into a free slot of every rank, one at a time. A fault leaves the adapters that are sampled from as they were."""
    async with served.adapters.loading:
        if method == "syncline_stage":
            _stop_by_hand(served)
        adapter.id = await served.adapters.room(timeout_seconds=timeout_seconds)
        try:
            found = await served.each_rank(method, adapter.id, *content)
            adapter.parameters = await served.digests_of(adapter.id, found)
        except SyncError:
            await served.each_rank("syncline_drop", [adapter.id])
            raise
        served.adapters.held.append(adapter)


def by_hand_routes(served: Served) -> APIRouter:
    """`/lora/*`, as older recipes call them."""
    router = APIRouter(route_class=Route)
    adapters = served.adapters
    num_loads = 0

    @router.get("/lora/status")
    async def status() -> dict[str, Any]:
        current = adapters.current
        return {
            "lora_available": adapters.num_slots > 0,
            "active_adapter_path": current and current.path,
            "active_adapter_name": current and current.name,
            "active_adapter_id": current and current.id,
            "load_count": num_loads,
            "available_adapters": [adapter.name for adapter in adapters.held],
            **served.receipt(),
        }

    @router.post("/lora/load")
    async def load(body: LoadBody) -> dict[str, Any]:
        nonlocal num_loads
        adapters.refuse_without()
        path = Path(body.adapter_path).absolute()
        config = _adapter_config(path)
        _stop_by_hand(served)
        adapter = adapters.new(body.adapter_name or path.name, str(path))
        timeout = LOAD_TIMEOUT_SECONDS
        await _load(served, adapter, "syncline_load_folder", adapter.name, str(path), timeout_seconds=timeout)
        adapters.by_hand = adapter
        served.sample_from_current()
        num_loads += 1
        return {
            "status": "ok",
            "adapter_path": adapter.path,
            "adapter_name": adapter.name,
            "adapter_id": adapter.id,
            "load_count": num_loads,
            "adapter_config": config,
        }

    @router.post("/lora/unload")
    async def unload() -> dict[str, Any]:
        """Back to the bridge's adapter, or to the base alone where no bridge has switched to one."""
        previous = _stop_by_hand(served)
        return {
            "status": "ok",
            "previous_adapter": previous and previous.path,
            "previous_name": previous and previous.name,
        }

    return router


def _stop_by_hand(served: Served) -> Adapter | None:
    """New requests get the bridge's adapter again; what they got is answered."""
    previous, served.adapters.by_hand = served.adapters.by_hand, None
    if previous is not None:
        served.sample_from_current()
    return previous


def _adapter_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads((path / "adapter_config.json").read_text())
    except OSError as error:
        raise HTTPException(HTTPStatus.NOT_FOUND, f"no adapter at {path}: {error}") from error
    except json.JSONDecodeError as error:
        raise EngineError(f"{path}/adapter_config.json is not JSON: {error}") from error
    found = {key: config.get(key) for key in ("r", "lora_alpha", "target_modules")}
    return found | {"base_model": config.get("base_model_name_or_path")}
