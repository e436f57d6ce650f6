"""A model as judge, behind any OpenAI-compatible endpoint: grades an answer, or says which of two is better.

Every verdict has one deadline, retries included. No verdict, because the endpoint failed, refused, or said something
else than was asked, is a `NoVerdict`: the attempt becomes an `ERROR` without a reward, never 0.
"""

import asyncio
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx

from syncline.config.proxies import is_near
from syncline.errors import ConfigError

T = TypeVar("T")
_BACKOFF_SECONDS = 0.5
_SCORE = re.compile(r"score:\s*(-?\d+(?:\.\d+)?)", re.IGNORECASE)
_BETTER = re.compile(r"better:\s*(A|B|tie)\b", re.IGNORECASE)
TEMPLATES = Path(__file__).with_name("templates")


class NoVerdict(Exception):
    """The judge did not judge; says who and why."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    url: str
    """With the version: `http://127.0.0.1:8000/v1`."""
    model: str
    api_key_env: str | None = None
    """The environment variable that holds the key, so that no file does."""
    timeout_seconds: float = 60.0
    """Of one verdict, retries included."""
    max_retries: int = 3
    max_tokens: int = 1024
    temperature: float = 0.0

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ConfigError([f"judge.url: {self.url!r} must begin with http:// or https://"])
        if self.timeout_seconds <= 0 or self.max_retries < 0 or self.max_tokens < 1:
            raise ConfigError([f"judge: {self} needs timeout_seconds > 0, max_retries >= 0 and max_tokens >= 1"])
        if self.api_key_env is not None and not os.environ.get(self.api_key_env):
            raise ConfigError(
                [f"judge.api_key_env: the environment has no {self.api_key_env}; export the key under it"]
            )


class Judge:
    """Verdicts from one endpoint. Use as an async context manager. `transport` and `sleep` are for tests."""

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        rubric: str,
        transport: httpx.AsyncBaseTransport | None = None,
        sleep: Callable[[float], Any] = asyncio.sleep,
    ) -> None:
        self._endpoint, self._rubric, self._sleep = endpoint, rubric, sleep
        key = os.environ[endpoint.api_key_env] if endpoint.api_key_env else None
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._http = httpx.AsyncClient(
            timeout=endpoint.timeout_seconds, headers=headers, transport=transport, trust_env=not is_near(endpoint.url)
        )

    async def __aenter__(self) -> "Judge":
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._http.aclose()

    async def grade(self, task: str, answer: str) -> float:
        """0 to 1. Raises `NoVerdict`."""
        prompt = (TEMPLATES / "grade.txt").read_text().format(rubric=self._rubric, task=task, answer=answer)
        return await self._ask(prompt, _grade)

    async def prefer(self, task: str, answer: str, other: str) -> float:
        """1 when `answer` is better, 0 when `other` is, 0.5 for a tie. Asked in both orders: place counts nothing.

        Raises `NoVerdict`.
        """
        ask, orders = (TEMPLATES / "compare.txt").read_text(), ((answer, other), (other, answer))
        prompts = [ask.format(rubric=self._rubric, task=task, first=a, second=b) for a, b in orders]
        forward, backward = await asyncio.gather(*(self._ask(prompt, _first_is_better) for prompt in prompts))
        return (forward + 1.0 - backward) / 2

    async def _ask(self, prompt: str, read: Callable[[str], T]) -> T:
        """The first verdict that can be read. What may pass is tried again, until the deadline."""
        where, fault = self._endpoint, "it was not asked"
        try:
            async with asyncio.timeout(where.timeout_seconds):
                for attempt in range(where.max_retries + 1):
                    if attempt:
                        await self._sleep(_BACKOFF_SECONDS * 2 ** (attempt - 1))
                    try:
                        return read(await self._complete(prompt))
                    except (httpx.TransportError, _Passing) as error:
                        fault = f"{error!r}"
        except TimeoutError:
            fault += f", and {where.timeout_seconds:g} s are over"
        raise NoVerdict(f"judge {where.model!r} at {where.url} gave no verdict: {fault}")

    async def _complete(self, prompt: str) -> str:
        where = self._endpoint
        body = {
            "model": where.model,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": where.max_tokens,
            "temperature": where.temperature,
        }
        response = await self._http.post(f"{where.url.rstrip('/')}/chat/completions", json=body)
        if response.status_code == httpx.codes.TOO_MANY_REQUESTS or response.is_server_error:
            raise _Passing(f"{response.status_code}: {response.text[:200]}")
        if not response.is_success:
            raise NoVerdict(f"judge at {where.url} answered {response.status_code}: {response.text[:200]}")
        try:
            return str(response.json()["choices"][0]["message"]["content"])
        except (ValueError, LookupError, TypeError) as error:
            raise NoVerdict(f"judge at {where.url} does not speak OpenAI's chat: {response.text[:200]}") from error


class _Passing(Exception):
    """Worth another try."""


def _grade(text: str) -> float:
    found = _SCORE.findall(text)
    if not found or not 0 <= float(found[-1]) <= 10:
        raise _Passing(f"no `Score: N` from 0 to 10 in {text[-200:]!r}")
    return float(found[-1]) / 10


def _first_is_better(text: str) -> float:
    found = _BETTER.findall(text)
    if not found:
        raise _Passing(f"no `Better: A`, `B` or `tie` in {text[-200:]!r}")
    return {"a": 1.0, "b": 0.0, "tie": 0.5}[found[-1].lower()]
