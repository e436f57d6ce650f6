"""One engine as a collection sees it: does it answer, what weights does it hold, and completions from it."""

import resource
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import httpx

from syncline.config.proxies import is_near
from syncline.engines.client import EngineClient
from syncline.errors import ConfigError, EngineError
from syncline.types import Completion, FinishReason, SamplingParams

HEALTH_TIMEOUT_SECONDS = 15.0
LOAD_TIMEOUT_SECONDS = 300.0
OTHER_FILES = 256
"""Open beside the connections."""


class Gone(EngineError):
    """Nobody listens there: the engine's process has ended or not begun."""


class Replica(Protocol):
    """What `collect` needs of an engine; `EngineReplica` is one, tests have another."""

    name: str

    async def digest(self) -> str:
        """Of the weights it samples from. Raises `Gone`, or `EngineError` when it answers wrongly or late."""
        ...

    async def generate(self, prompt_token_ids: Sequence[int], sampling: SamplingParams) -> Completion: ...


class EngineReplica:
    """A running `syncline serve`. Use as an async context manager; `adapter`, a PEFT folder, is loaded if it is not."""

    def __init__(self, url: str, *, timeout_seconds: float, max_connections: int, adapter: str | None = None) -> None:
        self.name = url
        self._adapter = adapter and str(Path(adapter).absolute())
        self._client = EngineClient(url, timeout_seconds=timeout_seconds, max_connections=max_connections)
        self._http = httpx.AsyncClient(base_url=url, timeout=HEALTH_TIMEOUT_SECONDS, trust_env=not is_near(url))

    async def __aenter__(self) -> "EngineReplica":
        await self._client.__aenter__()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._client.__aexit__()
        await self._http.aclose()

    async def digest(self) -> str:
        if self._adapter is not None:
            held = (await self._ask("GET", "/lora/status"))["active_adapter_path"]
            if held != self._adapter:
                await self._ask("POST", "/lora/load", {"adapter_path": self._adapter}, LOAD_TIMEOUT_SECONDS)
        try:
            return (await self._ask("GET", "/health"))["digest"]
        except (ValueError, TypeError, KeyError) as error:
            raise EngineError(f"engine {self.name} told no digest at /health; give a `syncline serve`") from error

    async def generate(self, prompt_token_ids: Sequence[int], sampling: SamplingParams) -> Completion:
        try:
            [completion] = await self._client.generate(prompt_token_ids, sampling)
        except (ValueError, TypeError, KeyError) as error:
            raise EngineError(f"engine {self.name} answered no completion ({error}; NaN logprobs are null)") from error
        if completion.finish_reason is FinishReason.ABORT:
            raise EngineError(f"engine {self.name} broke off a completion")
        return completion

    async def _ask(
        self, method: str, path: str, body: Any = None, timeout_seconds: float = HEALTH_TIMEOUT_SECONDS
    ) -> Any:
        try:
            response = await self._http.request(method, path, json=body, timeout=timeout_seconds)
        except httpx.ConnectError as error:
            raise Gone(f"nobody listens at {self.name}") from error
        except httpx.HTTPError as error:
            raise EngineError(f"engine {self.name} broke off {path}: {error!r}") from error
        if not response.is_success:
            raise EngineError(f"engine {self.name} answered {path} with {response.status_code}: {response.text[:300]}")
        return response.json()


def allow_connections(count: int, *, field: str) -> None:
    """Raises this process's limit of open files, 1,024 on most machines. Raises `ConfigError` where it may not.
    `field` is what asks for so many."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = count + OTHER_FILES
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        fault = f"{count} connections to all engines, but this process may open {hard} files"
        raise ConfigError([f"{field}: {fault}; lower it, or raise `ulimit -Hn`"])
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
