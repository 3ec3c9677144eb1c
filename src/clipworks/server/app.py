"""`create_app`: the routes. Each reads its request, hands the work to the service and shapes the answer."""

from __future__ import annotations

import contextlib
import hmac
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse, PlainTextResponse
from starlette.exceptions import HTTPException

from .. import __version__
from ..errors import BadImage, ClipworksError, CollectionError
from . import schemas as s
from .docs import complete, failing
from .docs import page as docs_page
from .engine import Ask, unit
from .guard import COOKIE, Guard, Refused, log
from .metrics import TYPE
from .pictures import SIDES
from .service import Service, Settings
from .tasks import classified, compared, inspected, segmented

WEB = Path(__file__).with_name("web")


def create_app(
    collection: Any,
    *,
    encoder: Any = None,
    settings: Settings | None = None,
    token: str | None = None,
    hosts: Sequence[str] = (),
    local: bool = True,
    patience: float = 20.0,
) -> Guard:
    """Build the ASGI application for a collection.

    Parameters
    ----------
    collection : a collection or its folder
    encoder : a name, a path or an encoder (default: the one recorded in the collection)
    settings : limits and sizes
    token : what clients have to know; None lets all in
    hosts : further names that the server may be called by
    local : whether it is bound to a loopback address
    patience : seconds for the body of a request to arrive

    Returns
    -------
    the guarded application; `service` is on it
    """
    service = Service(collection, encoder, settings)

    @contextlib.asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        try:
            yield
        finally:
            service.stop()

    app = FastAPI(title="clipworks", version=__version__, docs_url=None, redoc_url=None, lifespan=life,
                  description="Search, classify, segment and inspect the images of one collection.")  # fmt: skip
    guard = Guard(app, service.metrics, local=local, hosts=hosts, token=token, patience=patience)
    guard.service = service  # type: ignore[attr-defined]
    _errors(app)
    _pages(app, guard, service)
    _routes(app, service)
    complete(app, token is not None)
    return guard


def _routes(app: FastAPI, service: Service) -> None:
    @app.post("/search", responses=failing(404, 503))
    async def search(request: s.Search) -> s.Ranked:
        """Rank images by words, by an image, by words minus words; without any, list them."""
        view = service.shelf.view()
        if request.offset + request.k > s.DEEPEST:
            raise ClipworksError(f"offset + k must be at most {s.DEEPEST}. Narrow the search instead.")
        async with service.admitted():
            rows = await service.read(lambda: view.where(request.where)) if request.where else None
            total = len(view) if rows is None else len(rows)
            end = request.offset + request.k
            texts = [*([] if request.text is None else [request.text]), *request.minus]
            own = service.row(view, request.like) if request.like else None
            if not (texts or request.image or request.vector or own is not None):
                chosen = np.arange(len(view))[request.offset : end] if rows is None else rows[request.offset : end]
                return _ranked(view, chosen, None, request.columns, total, end < total)
            vectors = [] if own is None else [np.asarray(view.collection.vectors[own], np.float32)]
            if request.vector:
                vectors.append(_vector(request.vector, view.collection.dim))
            pixels = await service.pixels([request.image] if request.image else [])
            weights = [1.0] * (len(texts) - len(request.minus)) + [-0.5] * len(request.minus)
            weights += [1.0] * (len(pixels) + len(vectors))
            k = min(end + (own is not None), total)
            if not k:
                return _ranked(view, np.empty(0, int), None, request.columns, total, False)
            found = await service.ask(Ask(texts, pixels, vectors, weights, view, k, rows))
        keep = found.rows != own if own is not None else np.ones(len(found.rows), bool)
        rest = total - (own is not None and (rows is None or own in rows))
        part = slice(request.offset, end)
        return _ranked(view, found.rows[keep][part], found.scores[keep][part], request.columns, total, end < rest)

    @app.post("/embed", responses=failing(503))
    async def embed(request: s.Embed) -> s.Vectors:
        """Turn texts and images into unit vectors of the collection's space."""
        if not request.texts and not request.images:
            raise ClipworksError("give texts or images, at least one.")
        async with service.admitted():
            found = await service.ask(Ask(request.texts, await service.pixels(request.images)))
        vectors = [[round(float(x), 7) for x in row] for row in found.vectors]
        kept = service.shelf.view().collection
        return s.Vectors(dim=kept.dim, fingerprint=kept.fingerprint, vectors=vectors)

    @app.post("/classify", responses=failing(404, 503))
    async def classify(request: s.Classify) -> s.Answers:
        """Say which of the names images show, or that it is none of these."""
        async with service.admitted():
            return await classified(service, request)

    @app.post("/segment", responses=failing(404, 503))
    async def segment(request: s.Segment) -> s.Segmented:
        """Give every pixel of an image one of the names."""
        async with service.admitted():
            return await segmented(service, request)

    @app.post("/inspect", responses=failing(404, 503))
    async def inspect(request: s.Inspect) -> s.Inspected:
        """Find what in an image is unlike images of good parts, or damaged by its look."""
        async with service.admitted():
            return await inspected(service, request)

    @app.post("/compare", responses=failing(404, 503))
    async def compare(request: s.Compare) -> s.Differences:
        """Find words that tell one selection of images from another."""
        async with service.admitted():
            return await compared(service, request)

    @app.get("/map", responses=failing(429, 503))
    async def map() -> s.Map:
        """Place the images in two dimensions, along the principal components of their vectors."""
        view = service.shelf.view()
        async with service.admitted():
            return s.Map(**await service.read(lambda: view.map))

    @app.get("/collection", responses=failing(429, 503))
    async def collection() -> s.Served:
        """Tell what is served: size, columns, encoder, limits."""
        view = service.shelf.view()
        async with service.admitted():
            columns = await service.read(lambda: view.columns)
        kept = view.collection
        limits = {"k": s.K, "deepest": s.DEEPEST, "text": s.TEXT, "body": 10 * 2**20,
                  "pixels": service.settings.max_pixels, "names": s.NAMES}  # fmt: skip
        return s.Served(rows=len(view), dim=kept.dim, encoder=kept.meta["encoder"].get("name"),
                        fingerprint=kept.fingerprint, version=kept.version, limits=limits,
                        columns=[s.Column(**c) for c in columns], clipworks=__version__)  # fmt: skip

    @app.get("/images/{item}", response_class=Response,
             responses={**failing(400, 404, 422, 429, 503),
                        200: {"content": {"image/jpeg": {}}, "description": "A JPEG"}})  # fmt: skip
    async def image(item: str, side: int = 320) -> Response:
        """Return a picture by its id, re-encoded, at most `side` pixels a side."""
        view = service.shelf.view()
        row = service.row(view, item)
        side = min(max(side, SIDES[0]), SIDES[1])
        async with service.admitted("pictures"):
            data = await service.read(lambda: service.gallery.jpeg(view, row, side), service.decoders)
        if data is None:
            raise Refused(404, "the picture of this image can no longer be read.")
        return Response(data, media_type="image/jpeg", headers={"cache-control": "private, max-age=3600"})


def _pages(app: FastAPI, guard: Guard, service: Service) -> None:
    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        """Say that the process lives."""
        return {"status": "ok"}

    @app.get("/readyz", responses=failing(503))
    async def readyz() -> dict[str, str]:
        """Say whether requests can be answered."""
        ready, state = service.ready()
        if not ready:
            raise Refused(503, state, {"retry-after": "1"})
        return {"status": "ready", "encoder": state}

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Return counters in Prometheus' text form."""
        return Response(service.metrics.text(), media_type=TYPE)

    @app.post("/login", status_code=204, responses=failing(401))
    async def login(request: s.Login, http: Request) -> Response:
        """Give the page a cookie for the token, so that it can show pictures."""
        if guard.token is None or not hmac.compare_digest(request.token.encode(), guard.token):
            raise Refused(401, "this is not the server's token.")
        answer = Response(status_code=204)
        secure = http.url.scheme == "https"
        answer.set_cookie(COOKIE, guard.cookie(), httponly=True, samesite="strict", secure=secure, max_age=30 * 86400)
        return answer

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(docs_page(app.openapi()))

    @app.get("/", include_in_schema=False)
    async def index() -> FileResponse:
        return FileResponse(WEB / "index.html", headers={"cache-control": "no-cache"})

    @app.get("/style.css", include_in_schema=False)
    async def style() -> FileResponse:
        return FileResponse(WEB / "style.css", headers={"cache-control": "no-cache"})

    @app.get("/app.js", include_in_schema=False)
    async def script() -> FileResponse:
        return FileResponse(WEB / "app.js", media_type="text/javascript", headers={"cache-control": "no-cache"})


def _errors(app: FastAPI) -> None:
    def failure(status: int, message: str, headers: Any = None) -> JSONResponse:
        return JSONResponse({"error": message}, status, headers)

    @app.exception_handler(Refused)
    async def refused(_: Request, error: Refused) -> JSONResponse:
        return failure(error.status, error.message, error.headers)

    @app.exception_handler(RequestValidationError)
    async def wrong(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]  # what was sent is not sent back: it may be long, or no JSON
        place = ".".join(str(part) for part in first["loc"] if part != "body")[:200]
        return failure(422, f"{place or 'the body'}: {first['msg'][:300]}")

    @app.exception_handler(BadImage)
    async def bad(_: Request, error: BadImage) -> JSONResponse:
        return failure(400, f"the image {error.reason}.")

    @app.exception_handler(CollectionError)
    async def damaged(_: Request, error: CollectionError) -> JSONResponse:
        log.error("%s", error)
        return failure(503, "the collection cannot be read now; the server's log says why.", {"retry-after": "10"})

    @app.exception_handler(ClipworksError)
    async def mistake(_: Request, error: ClipworksError) -> JSONResponse:
        return failure(400, str(error)[:500])

    @app.exception_handler(HTTPException)
    async def plain(_: Request, error: HTTPException) -> JSONResponse:
        return failure(error.status_code, str(error.detail)[:300], error.headers)

    @app.exception_handler(Exception)
    async def unexpected(_: Request, error: Exception) -> JSONResponse:
        return failure(500, "something went wrong; the server's log says what.")


def _vector(given: list[float], dim: int) -> np.ndarray:
    if len(given) != dim:
        raise ClipworksError(f"vector must hold {dim} numbers. Got {len(given)}.")
    return unit(np.asarray(given, np.float64)).astype(np.float32)


def _ranked(view: Any, rows: Any, scores: Any, columns: list[str], total: int, more: bool) -> s.Ranked:
    items = view.items(rows, scores, [c for c in columns if c != "digest"])
    return s.Ranked(items=[s.Item(**item) for item in items], total=total, more=more)
