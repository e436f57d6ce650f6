"""The two ends of an engine's wire that others hold: `EngineClient` samples, `EngineController` moves weights.

Every call has a deadline. A refused connection or a 503 within it means a starting or restarting engine, and is tried
again, ever less often; whatever is still wrong at the deadline becomes an `EngineError` that names the engine and the
last answer. A connection that breaks off is `EngineGone`: nothing of an answer was used.
"""

import asyncio
import base64
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any
from urllib.request import getproxies

import aiohttp
import httpx
from pydantic_core import from_json, to_json

from syncline.config.proxies import is_near
from syncline.errors import EngineError, EngineGone, EngineTimeout
from syncline.observe.images import read_image
from syncline.protocols import Membership, Paused, Receipt, Received
from syncline.types import Completion, FinishReason, ImageRef, SamplingParams, VersionSpan

RETRY_SECONDS = 0.2
MAX_RETRY_SECONDS = 3.0
IDLE_SECONDS = 3.0
"""How long a connection is kept that nothing is asked on: vLLM's server closes it after 5."""
GRACE_SECONDS = 5.0
"""For an engine that says itself what it waited for in vain, which names more than a deadline missed here."""
_STARTING = (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError)

log = logging.getLogger(__name__)


class NotReady(EngineError):
    """The engine is starting, restarting, or has no policy version yet: nothing was sampled, so anybody else may."""


class AtGate(NotReady):
    """Its engine is paused, and kept the request waiting for some seconds: it may be asked again at once."""


class EngineClient:
    """`Generate` over HTTP. Use as an async context manager.

    `unpublished_version` names the tokens of an engine that still holds the weights it was started with, for callers
    such as an evaluation; without it they carry no version and cannot be trained on.
    """

    def __init__(
        self, url: str, *, timeout_seconds: float, max_connections: int = 512, unpublished_version: int | None = None
    ) -> None:
        self.url = url
        self._unpublished_version = unpublished_version
        self._timeout_seconds = timeout_seconds
        self._max_connections = max_connections
        self._http: aiohttp.ClientSession

    async def __aenter__(self) -> "EngineClient":
        limit = self._timeout_seconds
        self._http = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=self._max_connections, keepalive_timeout=IDLE_SECONDS),
            timeout=aiohttp.ClientTimeout(total=None, connect=limit, sock_connect=limit, sock_read=limit),
            headers={"Content-Type": "application/json"},
            trust_env=not is_near(self.url) and bool(getproxies()),  # aiohttp looks for them at every request
        )
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._http.close()

    async def generate(
        self,
        prompt_token_ids: Sequence[int],
        sampling: SamplingParams,
        *,
        num_completions: int = 1,
        images: Sequence[ImageRef] = (),
    ) -> list[Completion]:
        """Tries again until the deadline while the engine is not ready."""
        deadline = time.monotonic() + self._timeout_seconds
        while True:
            try:
                return await self.attempt(prompt_token_ids, sampling, num_completions=num_completions, images=images)
            except NotReady as fault:
                if time.monotonic() > deadline:
                    raise EngineTimeout(f"{fault}, after {self._timeout_seconds:g} s") from fault
            await asyncio.sleep(RETRY_SECONDS)

    async def attempt(
        self,
        prompt_token_ids: Sequence[int],
        sampling: SamplingParams,
        *,
        num_completions: int = 1,
        images: Sequence[ImageRef] = (),
        needs_version: bool = False,
    ) -> list[Completion]:
        """Asks once. With `needs_version` an engine that holds no published policy is `NotReady`, too."""
        body: dict[str, Any] = {"prompt_token_ids": list(prompt_token_ids), "sampling": sampling}
        body |= {"num_completions": num_completions, "needs_version": needs_version}
        if images:  # their bytes, once for all completions: the engine may be on another host, and opens no files
            body["images"] = [base64.b64encode(await asyncio.to_thread(read_image, image)).decode() for image in images]
        answer = await self._post("/syncline/generate", body)
        read = tuple(answer.get("prompt_token_ids", ()))
        return [_completion(c, self._unpublished_version, read) for c in answer["completions"]]

    async def _post(self, path: str, body: dict[str, Any]) -> Any:
        url = f"{self.url.rstrip('/')}{path}"
        try:
            async with self._http.post(url, data=to_json(body)) as response:
                status, may_return = response.status, response.headers.get("Retry-After") == "0"
                content = await response.read()
        except _STARTING as error:
            raise NotReady(f"engine {self.url} was not ready for {path}: {error}") from error
        except TimeoutError as error:
            raise EngineTimeout(f"engine {self.url} did not answer {path} in {self._timeout_seconds:g} s") from error
        except aiohttp.ClientError as error:
            raise EngineGone(f"engine {self.url} broke off {path}: {error!r}") from error
        if status == httpx.codes.SERVICE_UNAVAILABLE:
            told = f"engine {self.url} was not ready for {path}: {content[:500].decode(errors='replace')}"
            raise AtGate(told) if may_return else NotReady(told)
        return _json(url, status, content)


class EngineController:
    """`EngineControl` over HTTP; `timeout_seconds` is the deadline of each call that is given none of its own."""

    def __init__(self, url: str, *, name: str = "engine", timeout_seconds: float) -> None:
        self.url = url
        self.name = f"{name} at {url}"
        self._timeout_seconds = timeout_seconds
        self._http = httpx.Client(base_url=url, trust_env=not is_near(url))
        self._pause: int | None = None
        """The last that the engine told of; whatever is asked of it in a publish names it (`routes.Order`)."""

    def close(self) -> None:
        self._http.close()

    def wait_until_ready(self, *, timeout_seconds: float) -> None:
        """Polls `/health` until it is 200, ever less often. Raises `EngineTimeout` with the last answer."""
        deadline, pause = time.monotonic() + timeout_seconds, RETRY_SECONDS
        while (fault := self._health_fault()) is not None:
            if (left := deadline - time.monotonic()) <= 0:
                raise EngineTimeout(f"{self.name} was not ready after {timeout_seconds:g} s: {fault}")
            if pause == RETRY_SECONDS:
                log.info("%s is not ready yet (%s); waiting up to %g s", self.name, fault, timeout_seconds)
            time.sleep(min(pause, left))
            pause = min(1.5 * pause, MAX_RETRY_SECONDS)

    def health(self) -> dict[str, Any]:
        """What `/health` tells: `status`, the engine's name, version, device and model, its receipt, and the newest
        policy version that it has sampled from."""
        return self._call("GET", "/health")

    def pause(self, *, mode: str, timeout_seconds: float, reuse_kv: bool = False) -> Paused:
        body = {"mode": mode, "timeout_seconds": timeout_seconds, "reuse_kv": reuse_kv}
        answer = self._call("POST", "/syncline/pause", body, 2 * timeout_seconds)
        return Paused(self._told(answer), answer["generation"])

    def resume(self, expected: Receipt) -> None:
        self._order("/syncline/resume", expected=asdict(expected))

    def receipt(self) -> Receipt:
        return self._told(self._call("GET", "/syncline/receipt"))

    def parameters(self) -> Mapping[str, str]:
        return self._call("GET", "/syncline/parameters")["parameters"]

    def measure(self) -> tuple[Receipt, Mapping[str, str]]:
        """The receipt and each parameter's digest, computed now over what the engine holds."""
        answer = self._call("POST", "/syncline/measure")
        return _receipt(answer), answer["parameters"]

    def export(self) -> Sequence[Mapping[str, Any]]:
        return self._call("POST", "/syncline/export")

    def reload(self, path: str, *, expected: Receipt, timeout_seconds: float) -> Receipt:
        return _receipt(self._order("/syncline/reload", timeout_seconds, path=path, expected=asdict(expected)))

    def adopt(self, expected: Receipt, *, resume: bool = False) -> Receipt:
        return _receipt(self._order("/syncline/adopt", expected=asdict(expected), resume=resume))

    def membership(self) -> Membership:
        return Membership(**self._call("GET", "/syncline/broadcast"))

    def join_broadcast(self, invitation: Mapping[str, Any], *, first_rank: int, timeout_seconds: float) -> str:
        body = {"invitation": invitation, "first_rank": first_rank, "timeout_seconds": timeout_seconds}
        return self._order("/syncline/broadcast/join", timeout_seconds + GRACE_SECONDS, **body)["plan"]

    def receive_broadcast(
        self, expected: Receipt, *, generation: str, timeout_seconds: float, resume: bool = False
    ) -> Received:
        body = {"generation": generation, "resume": resume, "timeout_seconds": timeout_seconds}
        wait = timeout_seconds + GRACE_SECONDS
        answer = self._order("/syncline/broadcast/receive", wait, expected=asdict(expected), **body)
        return Received(_receipt(answer), answer["prove_seconds"])

    def adapters(self) -> Mapping[str, Any]:
        return self._call("GET", "/syncline/adapters")

    def stage(self, adapter: Mapping[str, Any], *, policy_version: int, timeout_seconds: float) -> Mapping[str, str]:
        body = {"adapter": dict(adapter), "policy_version": policy_version, "timeout_seconds": timeout_seconds}
        return self._order("/syncline/stage", 2 * timeout_seconds, **body)["parameters"]

    def switch(self, receipt: Receipt, *, resume: bool = False) -> Receipt:
        return _receipt(self._order("/syncline/switch", expected=asdict(receipt), resume=resume))

    def restart(self, path: str, *, policy_version: int, timeout_seconds: float) -> Receipt:
        deadline = time.monotonic() + timeout_seconds
        self._order("/syncline/restart", timeout_seconds, path=path, policy_version=policy_version)
        while self._health_fault() is None:
            if time.monotonic() > deadline:
                raise EngineTimeout(f"{self.name} was asked to restart and still answers after {timeout_seconds:g} s")
            time.sleep(RETRY_SECONDS)
        self.wait_until_ready(timeout_seconds=max(0.0, deadline - time.monotonic()))
        return self.receipt()

    def _health_fault(self) -> str | None:
        try:
            response = self._http.get("/health", timeout=10.0)
        except httpx.HTTPError as error:
            return repr(error)
        return None if response.status_code == httpx.codes.OK else response.text

    def _told(self, answer: Any) -> Receipt:
        self._pause = answer["pause"]
        return _receipt(answer)

    def _order(self, path: str, timeout_seconds: float | None = None, /, **body: Any) -> Any:
        return self._call("POST", path, body | {"pause": self._pause}, timeout_seconds)

    def _call(self, method: str, path: str, body: Any = None, timeout_seconds: float | None = None) -> Any:
        limit = self._timeout_seconds if timeout_seconds is None else timeout_seconds
        try:
            response = self._http.request(method, path, json=body, timeout=limit)
        except httpx.TimeoutException as error:
            raise EngineTimeout(f"{self.name} did not answer {path} in {limit:g} s") from error
        except httpx.HTTPError as error:
            raise EngineGone(f"{self.name} broke off {path}: {error!r}") from error
        return _json(str(response.url), response.status_code, response.content)


def _json(url: str, status: int, content: bytes) -> Any:
    if httpx.codes.is_success(status):
        return from_json(content)
    raise EngineError(f"engine {url} answered {status}: {content[:500].decode(errors='replace')}")


def _receipt(answer: Any) -> Receipt:
    return Receipt(answer["policy_version"], answer["digest"])


def _completion(answer: Any, unpublished_version: int | None, prompt_token_ids: tuple[int, ...]) -> Completion:
    token_ids = tuple(answer["token_ids"])
    versions = tuple(VersionSpan(*span) for span in answer["versions"])
    if token_ids and not versions and unpublished_version is not None:
        versions = (VersionSpan(unpublished_version, 0, len(token_ids)),)
    return Completion(
        token_ids=token_ids,
        logprobs=tuple(answer["logprobs"]),
        versions=versions,
        finish_reason=FinishReason(answer["finish_reason"]),
        prompt_token_ids=prompt_token_ids,
    )
