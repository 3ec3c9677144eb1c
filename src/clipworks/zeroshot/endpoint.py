"""A language model behind any endpoint that speaks OpenAI's chat protocol, asked carefully.

Nothing is contacted but the URL that the user names, and no redirect is followed. Failed requests are repeated with
growing pauses; answers are kept on disk; size and time are limited; tokens and cost are counted.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import os
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ..atomic import write_json
from ..errors import ClipworksError, check_range

AGAIN = (408, 409, 425, 429, 500, 502, 503, 504)  # answers after which the same request may succeed
REFUSED = (401, 403)  # by the key
LIMIT = 1 << 20  # bytes read of one answer
LONGEST_PAUSE = 60.0  # seconds, also where the server asks for more

Messages = Sequence[Mapping[str, str]]


class NoAnswer(ClipworksError):
    """A language model that gave no usable answer, however often it was asked."""


class _Again(Exception):
    """A failure that may pass; `wait` is the pause that the server asks for, in seconds."""

    def __init__(self, reason: str, wait: float | None = None):
        super().__init__(reason)
        self.wait = wait


@dataclass
class Usage:
    """What the questions took: answers from the model and from the cache, repeated requests, tokens, cost."""

    asked: int = 0
    cached: int = 0
    repeated: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    cost: float = 0.0

    @property
    def any(self) -> bool:
        """Whether anything was asked for."""
        return bool(self.asked or self.cached or self.repeated)

    def __str__(self) -> str:
        tokens = f"{self.tokens_in:,} tokens in, {self.tokens_out:,} out"
        return (f"{self.asked:,} answers, {self.cached:,} more from the cache, {self.repeated:,} requests repeated, "
                f"{tokens}, cost {self.cost:.4f}")  # fmt: skip


class Endpoint:
    """A chat model of an OpenAI-compatible server; call it with messages to get its answer.

    Parameters
    ----------
    url : base URL of the server, for example http://localhost:8000/v1; it must be given, nothing else is contacted
    model : name of the model, as the server knows it
    key_variable : environment variable that holds the key; none is sent where it is not set
    temperature : of the answers; 0 asks for the likeliest
    max_tokens : longest answer, in tokens
    timeout : longest time for one request, in seconds
    retries : how often a failed request is repeated
    pause : seconds before the first repetition, doubled each time, at most 60; a server's Retry-After comes first
    cache : folder in which answers are kept and found again, by model, messages and settings
    price_in, price_out : price of a million tokens read and written, in any currency, to count the cost

    Attributes
    ----------
    usage : what was asked so far

    Raises
    ------
    ClipworksError
        If a setting cannot be used, or the server refuses the request (a wrong key, an unknown model).
    NoAnswer
        If every try failed.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        key_variable: str = "CLIPWORKS_API_KEY",
        temperature: float = 0.0,
        max_tokens: int = 100,
        timeout: float = 60.0,
        retries: int = 5,
        pause: float = 1.0,
        cache: str | Path | None = None,
        price_in: float = 0.0,
        price_out: float = 0.0,
    ):
        self.url, self.model, self.key_variable = check_url(url), model, key_variable
        if not model:
            raise ClipworksError("model must be a name that the server knows. Got none.")
        self.temperature, self.max_tokens = check_range("temperature", temperature, 0), max_tokens
        check_range("max_tokens", max_tokens, 1)
        self.timeout, self.retries = check_range("timeout", timeout, 0.01), int(check_range("retries", retries, 0))
        self.pause = check_range("pause", pause, 0)
        self.cache = None if cache is None else Path(cache)
        self.price_in, self.price_out = check_range("price_in", price_in, 0), check_range("price_out", price_out, 0)
        self.usage = Usage()
        self._opener = urllib.request.build_opener(_NoRedirect)

    def __call__(self, messages: Messages) -> str:
        """Return the model's answer to messages, each with `role` and `content`."""
        question = {"model": self.model, "messages": [dict(m) for m in messages],
                    "temperature": self.temperature, "max_tokens": self.max_tokens}  # fmt: skip
        place = self._place(question)
        kept = _kept(place)
        if kept is not None:
            self.usage.cached += 1
            return kept
        answer = self._ask(json.dumps(question).encode())
        self.usage.asked += 1
        if place is not None:
            write_json(place, question | {"answer": answer}, ensure_ascii=False)
        return answer

    def _place(self, question: dict[str, Any]) -> Path | None:
        if self.cache is None:
            return None
        name = hashlib.sha256(json.dumps(question, sort_keys=True).encode()).hexdigest()
        return self.cache / f"{name}.json"

    def _ask(self, question: bytes) -> str:
        reason, wait = "", 0.0
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(min(wait, LONGEST_PAUSE))
                self.usage.repeated += 1
            try:
                return self._read(self._post(question))
            except _Again as error:
                reason = str(error)
                wait = self.pause * 2**attempt if error.wait is None else error.wait
        times = "once" if not self.retries else f"in {self.retries + 1} tries"
        raise NoAnswer(f"{self.url} gave no usable answer, asked {times}. The last failure: {reason}.")

    def _post(self, question: bytes) -> bytes:
        key = os.environ.get(self.key_variable, "").strip()
        headers = {"Content-Type": "application/json", "User-Agent": "clipworks"}
        if key:
            if not (key.isascii() and key.isprintable()):
                raise ClipworksError(f"{self.key_variable} must hold a key in plain characters. Got others.")
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(f"{self.url}/chat/completions", question, headers)
        deadline = time.monotonic() + self.timeout
        try:
            with self._opener.open(request, timeout=self.timeout) as response:
                return _limited(response, deadline)
        except urllib.error.HTTPError as error:
            with error:
                said = _shown(_limited(error, deadline), key)
            status = f"status {error.code}: {said}"
            if error.code in AGAIN:
                raise _Again(status, _seconds(error.headers.get("Retry-After"))) from None
            about = f"The key is read from {self.key_variable}, which is {'set' if key else 'not set'}."
            hint = f" {about}" if error.code in REFUSED else ""
            raise ClipworksError(f"{self.url} refused the request, {status}.{hint}") from None
        except (OSError, http.client.HTTPException) as error:
            cause = getattr(error, "reason", error)
            if isinstance(cause, ssl.SSLCertVerificationError):
                raise ClipworksError(f"url must have a certificate that can be trusted. {self.url}: {cause}.") from None
            raise _Again(f"{type(cause).__name__} {cause}".strip()) from None

    def _read(self, text: bytes) -> str:
        """The answer inside the protocol's JSON."""
        try:
            found = json.loads(text)
            answer = found["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError, RecursionError):
            raise _Again(f"it is not of the chat protocol: {_shown(text)}") from None
        if not isinstance(answer, str):
            raise _Again("it holds no text (its tokens may have run out: max_tokens)")
        used = found.get("usage")
        read, written = (_count(used, name) for name in ("prompt_tokens", "completion_tokens"))
        self.usage.tokens_in += read
        self.usage.tokens_out += written
        self.usage.cost += (read * self.price_in + written * self.price_out) / 1e6
        return answer


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Leaves a redirect as the error that it is: the key goes to the server that the user named and to no other."""

    def redirect_request(self, *_: Any) -> None:
        return None


def check_url(url: str) -> str:
    """Return a base URL without its last slash, or raise where it is none.

    >>> check_url("http://localhost:8000/v1/")
    'http://localhost:8000/v1'
    """
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and parts.hostname and (parts.port or 1)
    except ValueError:
        usable = False
    if not usable or any(c.isspace() for c in url):
        raise ClipworksError(f"url must be the base of a server, as http://localhost:8000/v1. Got {url!r}.")
    if parts.username or parts.password:
        raise ClipworksError("url must hold no name and no password; keys belong in the environment variable.")
    if parts.query or parts.fragment:
        raise ClipworksError(f"url must end before ? and #. Got {url!r}.")
    return url.rstrip("/").removesuffix("/chat/completions")


def _kept(place: Path | None) -> str | None:
    """The answer of a cache file; None where there is none, or none that can be read."""
    try:
        found = json.loads(place.read_text(encoding="utf-8")) if place is not None else None
    except (OSError, ValueError):
        return None
    answer = found.get("answer") if isinstance(found, dict) else None
    return answer if isinstance(answer, str) else None


def _limited(response: Any, deadline: float) -> bytes:
    """Read an answer, not more than LIMIT bytes and not past the deadline."""
    parts, size = [], 0
    while part := response.read1(1 << 16):
        parts.append(part)
        size += len(part)
        if size > LIMIT:
            raise _Again(f"it is longer than {LIMIT:,} bytes")
        if time.monotonic() > deadline:
            raise _Again("it took longer than the timeout")
    return b"".join(parts)


def _shown(text: bytes, secret: str = "") -> str:
    """What a server said, in one printable line of at most 200 characters, without the key."""
    said = text.decode("utf-8", "replace")
    with contextlib.suppress(ValueError, LookupError, TypeError, RecursionError):
        said = str(json.loads(said)["error"]["message"])
    said = said.replace(secret, "***") if secret else said
    said = "".join(c if c.isprintable() else " " for c in said)
    return repr(" ".join(said.split())[:200])


def _seconds(text: str | None) -> float | None:
    """Seconds of a Retry-After header; None for dates and for none."""
    return float(text) if text is not None and text.strip().isdecimal() else None


def _count(used: Any, name: str) -> int:
    found = used.get(name) if isinstance(used, dict) else 0
    return found if isinstance(found, int) and found > 0 else 0
