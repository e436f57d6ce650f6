"""What every request passes before a route sees it: who may call, from where, and how much it may send.

The server is one process's on its own machine by default. A browser is not its client: a page of another site could
reach a loopback port, so whatever says that it comes from one is refused. Off loopback a token is needed, as a bearer
token or as the password of HTTP basic authentication, which is what clients that only take a URL send for
`http://syncline:TOKEN@host:port`.
"""

import asyncio
import base64
import binascii
import hmac
import ipaddress
import zlib
from contextlib import nullcontext
from urllib.parse import urlsplit

from fastapi import HTTPException, Request
from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from syncline.errors import ConfigError

TOKEN_VARIABLE = "SYNCLINE_TRAJECTORY_TOKEN"
BODY_SECONDS = 120.0
"""How long a body may take to arrive."""
LARGE_BODIES = 8
"""Bodies of more than `SMALL_BYTES`, or packed, that are read at once: what bounds their memory."""
SMALL_BYTES = 1 << 20
_SAME = ("same-origin", "none")
_OPEN = ("/health",)
"""What needs no token: whether it runs."""
_CHALLENGES = ("Bearer", 'Basic realm="syncline, the token is the password"')
"""A header each, since browsers, which ask a person for the second, do not take both from one."""


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def needed_token(host: str, token: str | None) -> str | None:
    """The token to ask for. Raises `ConfigError` for an address that others can reach without one."""
    if not token and not is_loopback(host):
        raise ConfigError(
            [f"trajectory.host: {host} can be reached from other machines; set {TOKEN_VARIABLE}, or use 127.0.0.1"]
        )
    return token or None


class Guard:
    """ASGI middleware: 401 without the token, 403 for other sites' pages."""

    def __init__(self, app: ASGIApp, *, token: str | None) -> None:
        self._app = app
        self._token = token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            refusal = self._refusal(Headers(scope=scope), needs_token=scope["path"] not in _OPEN)
            if refusal is not None:
                return await refusal(scope, receive, send)
        await self._app(scope, receive, send)

    def _refusal(self, headers: Headers, *, needs_token: bool) -> JSONResponse | None:
        origin = urlsplit(headers.get("origin", "")).netloc
        foreign = headers.get("sec-fetch-site", "none") not in _SAME or origin not in ("", headers.get("host", ""))
        if foreign or headers.get("origin") == "null":
            return JSONResponse({"error": "pages of other sites may not call this server"}, 403)
        if (
            self._token is not None
            and needs_token
            and not hmac.compare_digest(_presented(headers), self._token.encode())
        ):
            answer = JSONResponse(
                {"error": "send the run's token: Authorization: Bearer TOKEN, or http://syncline:TOKEN@host:port"}, 401
            )
            for challenge in _CHALLENGES:
                answer.headers.append("WWW-Authenticate", challenge)
            return answer
        return None


def _presented(headers: Headers) -> bytes:
    scheme, _, value = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return value.strip().encode()
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(value, validate=True).partition(b":")[2]
        except binascii.Error:
            return b""
    return b""


async def read_json(request: Request) -> bytes:
    """The body, unpacked when it is gzip, refused while it arrives when it is too long. JSON by name only, so that no
    web page can send one."""
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise HTTPException(415, "send the body as Content-Type: application/json")
    limit = request.app.state.max_request_bytes
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("identity", "gzip"):
        raise HTTPException(415, f"Content-Encoding {encoding!r} is not read here; send gzip or none")
    unpack = _Gzip() if encoding == "gzip" else None
    length = request.headers.get("content-length", "")
    is_small = unpack is None and length.isdecimal() and int(length) <= SMALL_BYTES
    try:
        async with asyncio.timeout(BODY_SECONDS), nullcontext() if is_small else request.app.state.large_bodies:
            return await _read(request, limit, unpack)
    except TimeoutError as error:
        message = f"the body had not arrived after {BODY_SECONDS:g} s; send it faster, or fewer at once"
        raise HTTPException(503, message, headers={"Retry-After": "5", "Connection": "close"}) from error


async def _read(request: Request, limit: int, unpack: "_Gzip | None") -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk if unpack is None else unpack.feed(chunk, room=limit + 1 - len(body))
        if len(body) > limit:
            raise HTTPException(413, f"the body is over trajectory.max_request_bytes = {limit}; raise it or send less")
    if unpack is not None and body and not unpack.is_whole:
        raise HTTPException(400, "Invalid gzip payload: it ends early")
    return bytes(body)


class _Gzip:
    """Unpacks no more than there is room for, however much a few bytes would expand to."""

    def __init__(self) -> None:
        self._unpack = zlib.decompressobj(wbits=31)

    @property
    def is_whole(self) -> bool:
        return self._unpack.eof

    def feed(self, chunk: bytes, *, room: int) -> bytes:
        try:
            return self._unpack.decompress(chunk, room)
        except zlib.error as error:
            raise HTTPException(400, f"Invalid gzip payload: {error}") from error
