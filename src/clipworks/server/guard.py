"""`Guard`: what every request passes before the application sees it, and what every answer carries.

The name in `Host` (a page of another site that points its name at this machine has the wrong one), the origin, the
token, the size of the body and the time it takes. Plain ASGI, so that nothing is parsed before it is allowed.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import json
import logging
import re
import time
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

from .metrics import Metrics

BODY = 10 * 2**20  # bytes of one request
BUFFERED = 16 * BODY  # bytes of all requests that are being received
PATIENCE = 20.0  # seconds for a body to arrive
COOKIE = "clipworks"
OPEN = ("/", "/style.css", "/app.js", "/healthz", "/readyz", "/login")  # need no token: they tell nothing
ROUTES = ("search", "embed", "classify", "segment", "inspect", "compare", "map", "collection", "images", "healthz",
          "readyz", "metrics", "openapi.json", "docs", "login", "style.css", "app.js")  # fmt: skip
HOST = re.compile(r"(\[[^\[\]]+\]|[^\[\]]+)(:[0-9]*)?")
CSP = ("default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
       "base-uri 'none'; form-action 'none'; frame-ancestors 'none'")  # fmt: skip
HEADERS = {
    "content-security-policy": CSP,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
}
log = logging.getLogger("clipworks.server")


class Refused(Exception):
    """A request that goes no further: status, message, further headers."""

    def __init__(self, status: int, message: str, headers: dict[str, str] | None = None):
        super().__init__(message)
        self.status, self.message, self.headers = status, message, headers or {}


class Guard:
    """The application behind its checks.

    Parameters
    ----------
    app : ASGI application
    metrics : counts every answer
    local : whether the server is bound to a loopback address
    hosts : further names that it may be called by
    token : what a client has to know; None lets all in
    max_body : bytes of one request
    patience : seconds for a body to arrive
    """

    def __init__(self, app: Any, metrics: Metrics, *, local: bool = True, hosts: Sequence[str] = (),
                 token: str | None = None, max_body: int = BODY, patience: float = PATIENCE):  # fmt: skip
        self.app, self.metrics, self.local = app, metrics, local
        self.hosts = {host.lower().rstrip(".") for host in hosts} | {"localhost"}
        self.token = None if token is None else token.encode()
        self.max_body, self.patience = max_body, patience
        self.buffered = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
                return None
            return await self.app(scope, receive, send)
        start, status = time.monotonic(), 500
        asked = scope["path"]

        async def answer(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                present = {name.lower() for name, _ in message["headers"]}
                extra = {**HEADERS, "cache-control": "no-store"}
                message["headers"] = [*message["headers"], *((k.encode(), v.encode()) for k, v in extra.items()
                                                             if k.encode() not in present)]  # fmt: skip
            await send(message)

        try:
            headers = {k.decode("latin-1").lower(): v.decode("latin-1") for k, v in scope["headers"]}
            self._check(scope, headers)
            body = await self._body(scope, headers, receive)
            try:
                await self.app(scope, _replay(body, receive), answer)
            finally:
                self.buffered -= len(body)
        except Refused as refused:
            await _refuse(answer, refused)
        finally:
            first = asked.split("/")[1] if "/" in asked else ""
            route = "/" + (first if first in ROUTES else "" if asked == "/" else "other")
            self.metrics.request(route, status, time.monotonic() - start)
            log.info("%s %r %d %.0f ms", scope["method"], asked[:200], status, 1000 * (time.monotonic() - start))

    # -- checks --------------------------------------------------------------------------------------------------

    def _check(self, scope: Any, headers: dict[str, str]) -> None:
        if not self._known(headers.get("host", "")):
            raise Refused(421, "the name in Host is not one of this server's; --allow-host adds one.")
        if scope["method"] not in ("GET", "HEAD", "POST"):
            raise Refused(405, "only GET, HEAD and POST are answered.", {"allow": "GET, HEAD, POST"})
        origin = headers.get("origin")
        if origin is not None and origin.partition("://")[2].lower() != headers["host"].lower():
            raise Refused(403, "requests from pages of other sites are not answered.")
        if headers.get("sec-fetch-site", "none") not in ("none", "same-origin") and scope["path"] not in ("/", "/docs"):
            raise Refused(403, "requests from pages of other sites are not answered.")
        if scope["method"] == "POST" and headers.get("content-type", "").split(";")[0].strip() != "application/json":
            raise Refused(415, "the body must be JSON, with the content type application/json.")
        if self.token is not None and scope["path"] not in OPEN and not self.knows(headers):
            raise Refused(401, "this needs the server's token.", {"www-authenticate": "Bearer"})

    def _known(self, host: str) -> bool:
        if not HOST.fullmatch(host):  # urlsplit finds a number in "evil.example[::1]"
            return False
        try:
            name = urlsplit("//" + host)
            given = (name.hostname or "").lower().rstrip(".")
            name.port  # noqa: B018  (raises for what is no port)
        except ValueError:
            return False
        if not given or name.username is not None or name.path or name.query or name.fragment:
            return False
        if given in self.hosts:
            return True
        try:
            address = ipaddress.ip_address(given)
        except ValueError:
            return False
        return address.is_loopback or not self.local  # a name can be pointed anywhere, a number cannot

    def knows(self, headers: dict[str, str]) -> bool:
        """Whether a request carries the token, or the cookie that `/login` gave for it."""
        if self.token is None:
            return True
        scheme, _, given = headers.get("authorization", "").partition(" ")
        by_header = scheme.lower() == "bearer" and same(given.strip(), self.token.decode())
        cookies = dict(part.strip().partition("=")[::2] for part in headers.get("cookie", "").split(";"))
        return by_header or same(cookies.get(COOKIE, ""), self.cookie())

    def cookie(self) -> str:
        """What the page keeps in the place of the token."""
        return hmac.new(self.token or b"", b"clipworks page", hashlib.sha256).hexdigest()

    async def _body(self, scope: Any, headers: dict[str, str], receive: Any) -> bytes:
        """All of the body, or a refusal as soon as it is too long or too slow."""
        if scope["method"] != "POST":
            return b""
        too_long = Refused(413, f"a request may have {self.max_body:,} bytes.", {"connection": "close"})
        length = headers.get("content-length", "")
        if length and (not length.isdigit() or int(length) > self.max_body):
            raise too_long
        parts: list[bytes] = []
        size = 0

        async def read() -> None:
            nonlocal size
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise Refused(400, "the request ended early.")
                part = message.get("body", b"")
                size += len(part)
                self.buffered += len(part)
                parts.append(part)
                if size > self.max_body:
                    raise too_long
                if self.buffered > BUFFERED:
                    raise Refused(429, "too much is being received; try again.", {"retry-after": "1"})
                if not message.get("more_body"):
                    return

        try:
            await asyncio.wait_for(read(), self.patience)
        except asyncio.TimeoutError:
            self.buffered -= size
            raise Refused(408, "the request took too long to arrive.", {"connection": "close"}) from None
        except BaseException:
            self.buffered -= size
            raise
        return b"".join(parts)


def same(one: str, two: str) -> bool:
    """Whether two secrets are equal, in a time that tells nothing about where they differ."""
    return hmac.compare_digest(hashlib.sha256(one.encode()).digest(), hashlib.sha256(two.encode()).digest())


def _replay(body: bytes, receive: Any) -> Any:
    sent = False

    async def again() -> Any:
        nonlocal sent
        if sent:
            return await receive()  # tells when the client has gone
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


async def _refuse(send: Any, refused: Refused) -> None:
    text = json.dumps({"error": refused.message}).encode()
    headers = {"content-type": "application/json", "content-length": str(len(text)), **refused.headers}
    start = {"type": "http.response.start", "status": refused.status,
             "headers": [(k.encode(), v.encode()) for k, v in headers.items()]}  # fmt: skip
    await send(start)
    await send({"type": "http.response.body", "body": text})
