"""`serve`: bind, run until a signal says stop, answer what is in work, leave."""

from __future__ import annotations

import ipaddress
import logging
import os
import signal
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ClipworksError, check_range, need

if TYPE_CHECKING:
    from ..encoders.encoder import Encoder

TOKEN = "CLIPWORKS_TOKEN"
SHORTEST = 16  # characters of a token
CONNECTIONS = 512
PATIENCE = 15.0  # seconds for the head of a request to arrive


def serve(
    collection: Any,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    token_file: str | Path | None = None,
    allow_host: Sequence[str] = (),
    encoder: str | Encoder | None = None,
    preload: bool = True,
    idle: float | None = None,
    max_batch: int = 16,
    max_wait: float = 50.0,
    max_queue: int = 64,
    timeout: float = 30.0,
    max_pixels: int = 20_000_000,
    expose_paths: bool = False,
    grace: float = 10.0,
    say: Any = print,
) -> int:
    """Serve a collection over HTTP: the page at /, the interface for programs at /docs.

    Parameters
    ----------
    collection : a collection or its folder
    host : address to listen at; one that other machines reach needs a token
    port : port to listen at; 0 takes a free one
    token_file : file with the token that clients must send (default: the environment variable CLIPWORKS_TOKEN)
    allow_host : further names that the server may be called by, such as photos.example.org
    encoder : for words and images (default: the one recorded in the collection)
    preload : load the encoder at the start, not at the first request
    idle : minutes without a request after which the encoder's memory is given back; it is loaded again when needed
    max_batch : most requests that are answered together
    max_wait : milliseconds that a batch may wait for further requests
    max_queue : most requests that wait; further ones are told to come again (429)
    timeout : seconds after which a request is given up
    max_pixels : largest image that may be sent, width x height
    expose_paths : show keys that are absolute paths as they are, not as the file's name
    grace : seconds that requests in work have to end after a signal to stop
    say : prints a line for the person who started it

    Returns
    -------
    number of requests that were answered

    Raises
    ------
    ClipworksError
        If the address needs a token and there is none, or an option cannot be used.
    MissingExtra
        If FastAPI or uvicorn is not installed.
    """
    need("fastapi", "serve")
    uvicorn = need("uvicorn", "serve")
    check_range("port", port, 0, 65535)
    check_range("timeout", timeout, 0.1)
    check_range("grace", grace, 0)
    if idle is not None:
        check_range("idle", idle, 0)
    local = is_local(host)
    token = read_token(token_file)
    if token is None and not local:
        raise ClipworksError(f"host {host!r} can be reached by other machines, so a token is needed: put one of at "
                             f"least {SHORTEST} characters into {TOKEN} or into a file for --token-file.")  # fmt: skip
    from .app import create_app
    from .service import Settings

    settings = Settings(max_batch, max_wait / 1000, max_queue, timeout, None if idle is None else 60 * idle, preload,
                        expose_paths, int(check_range("max_pixels", max_pixels, 1)))  # fmt: skip
    bound = _bound(host, port)
    try:
        app = create_app(collection, encoder=encoder, settings=settings, token=token,
                         hosts=[*allow_host, *([] if local else [host])], local=local)  # fmt: skip
        config = uvicorn.Config(app, http=_protocol(), ws="none", log_config=None, access_log=False,
                                server_header=False, date_header=False, limit_concurrency=CONNECTIONS,
                                timeout_keep_alive=10, timeout_graceful_shutdown=max(1, round(grace)),
                                h11_max_incomplete_event_size=32 * 1024, proxy_headers=False)  # fmt: skip
        server = uvicorn.Server(config)
        _log()
        shown = f"[{host}]" if ":" in host else host
        say(f"serving {len(app.service.shelf.view()):,} images at http://{shown}:{bound.getsockname()[1]}"  # type: ignore[attr-defined]
            + (" (token needed)" if token else ""))  # fmt: skip
        try:
            server.run(sockets=[bound])
        except KeyboardInterrupt:  # uvicorn raises the signal again when it has stopped
            signal.signal(signal.SIGINT, signal.default_int_handler)
    finally:
        bound.close()
    return sum(app.service.metrics.requests.values())  # type: ignore[attr-defined]


def is_local(host: str) -> bool:
    """Whether only this machine reaches an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def read_token(path: str | Path | None) -> str | None:
    """The token of a file, or of the environment; None where neither has one."""
    if path is None:
        token, where = os.environ.get(TOKEN, "").strip(), f"{TOKEN}"
        if not token:
            return None
    else:
        file = Path(path)
        if not file.is_file():
            raise ClipworksError(f"token_file must be a file. Got {str(path)!r}.")
        token, where = file.read_text(encoding="utf-8").strip(), f"token_file {str(path)!r}"
    if len(token) < SHORTEST or not token.isascii() or any(c.isspace() for c in token):
        raise ClipworksError(f"{where} must hold one word of at least {SHORTEST} ASCII characters. Got {len(token)}.")
    return token


def _bound(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # with the protocol named asyncio sends at once what it is given; without, the body of an answer waits until the
    # client has acknowledged its head, some 40 ms
    made = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind((host, port))
        made.listen(1024)  # from now on clients wait in line instead of being refused
    except OSError as error:
        made.close()
        raise ClipworksError(f"host and port must be free. {host}:{port} cannot be had: {error.strerror}.") from error
    return made


def _log() -> None:
    """What happened, to stderr; one line per request only with CLIPWORKS_DEBUG."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    for name in ("clipworks.server", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.INFO if os.environ.get("CLIPWORKS_DEBUG") else logging.WARNING)


def _protocol() -> Any:
    """uvicorn's protocol, which drops a connection that does not send the head of a request in time."""
    import h11
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class Patient(H11Protocol):
        """A connection whose wait for the head of a request ends."""

        patience: Any = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._wait()

        def connection_lost(self, exc: Any) -> None:
            self._rest()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.conn.their_state is not h11.IDLE:
                self._rest()
            elif self.patience is None:
                self._wait()

        def _wait(self) -> None:
            self.patience = self.loop.call_later(PATIENCE, self._give_up)

        def _rest(self) -> None:
            if self.patience is not None:
                self.patience.cancel()
                self.patience = None

        def _give_up(self) -> None:
            self.patience = None
            if self.conn.their_state is h11.IDLE and not self.transport.is_closing():
                self.transport.close()

    return Patient
