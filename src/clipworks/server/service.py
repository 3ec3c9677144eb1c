"""`Service`: what the routes share: the collection, the engine behind its batcher, threads for pictures, the limits."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np

from ..data.decode import Limits, decode_pixels
from ..data.loader import one_core
from ..errors import BadImage, ClipworksError
from .batcher import Batcher, Busy, Closed
from .engine import Ask, Call, Engine, Found, NoEncoder, OutOfMemory, lacks_memory
from .guard import Refused
from .metrics import Metrics
from .pictures import Gallery, picture
from .schemas import Condition, image_bytes
from .shelf import Shelf, View

T = TypeVar("T")
SIDE = 768  # longer side of the images that masks and heat maps are made of


@dataclass(frozen=True)
class Settings:
    """What `serve` was asked for, as far as requests need it.

    Attributes
    ----------
    max_batch, max_wait, max_queue : as for `Batcher`
    timeout : seconds after which a request is given up
    idle : seconds without a request after which the encoder is given back; None keeps it
    preload : whether the encoder is loaded at the start
    expose_paths : whether keys that are absolute paths are shown
    max_pixels : of an image that is sent
    """

    max_batch: int = 16
    max_wait: float = 0.05
    max_queue: int = 64
    timeout: float = 30.0
    idle: float | None = None
    preload: bool = True
    expose_paths: bool = False
    max_pixels: int = 20_000_000


class Service:
    """Everything behind the routes.

    Parameters
    ----------
    collection : that is served
    encoder : a name, a path or an encoder (default: the one recorded in the collection)
    settings : limits
    """

    def __init__(self, collection: Any, encoder: Any = None, settings: Settings | None = None):
        self.settings = settings or Settings()
        self.metrics = Metrics()
        self.limits = Limits(max_bytes=16 * 2**20, max_pixels=self.settings.max_pixels)
        self.shelf = Shelf(collection, expose_paths=self.settings.expose_paths)
        self.engine = Engine(self.shelf, lambda: self._load(encoder), self.settings.idle)
        self.batcher = Batcher(self.engine.work, max_batch=self.settings.max_batch, max_wait=self.settings.max_wait,
                               max_queue=self.settings.max_queue, idle=self.engine.tidy,
                               observe=self.metrics.batch)  # fmt: skip
        self.decoders = ThreadPoolExecutor(2, "clipworks-pictures", initializer=one_core)
        self.readers = ThreadPoolExecutor(2, "clipworks-read")
        self.gallery = Gallery()
        self.stopping = False
        self._inside: dict[str, int] = {}
        self._first: Any = None
        self.metrics.gauges |= {
            "queue_length": lambda: self.batcher.waiting,
            "model_loaded": lambda: float(self.engine.state == "loaded"),
            "model_loads": lambda: self.engine.loads,
            "model_unloads": lambda: self.engine.unloads,
            "allocation_failures": lambda: self.engine.failures,
            "collection_rows": lambda: len(self.shelf.view()),
        }

    def _load(self, encoder: Any) -> Any:
        from ..store.identity import encoder_of

        return encoder_of(self.shelf.view().collection, encoder)

    # -- life ----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to load the encoder, if that is wanted."""
        if self.settings.preload:
            self._first = self.batcher.submit(Call(lambda _: None))
            self.readers.submit(lambda: self.shelf.view().where([Condition(column="key", operator="missing")]))

    def stop(self) -> None:
        """Answer what waits, then end the threads."""
        self.stopping = True
        self.batcher.close(self.settings.timeout)
        for pool in (self.decoders, self.readers):
            pool.shutdown(wait=False, cancel_futures=True)

    def ready(self) -> tuple[bool, str]:
        """Whether requests are answered without waiting for a first load, and what is going on."""
        if self.stopping:
            return False, "stopping"
        if self._first is not None and not self._first.done():
            return False, "the encoder is being loaded"
        if self._first is not None and (error := self._first.exception()) is not None:
            return False, str(error) if isinstance(error, NoEncoder) else "the encoder could not be loaded"
        return True, self.engine.state

    # -- work ----------------------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def admitted(self, kind: str = "work") -> AsyncIterator[None]:
        """One of at most `max_queue` + `max_batch` requests that are in work at a time."""
        if self.stopping:
            raise Refused(503, "the server is stopping.", {"retry-after": "5"})
        if self._inside.get(kind, 0) >= self.settings.max_queue + self.settings.max_batch:
            raise self._busy(1)
        self._inside[kind] = self._inside.get(kind, 0) + 1
        try:
            yield
        finally:
            self._inside[kind] -= 1

    def _busy(self, after: int) -> Refused:
        self.metrics.count("rejected")
        return Refused(429, "too many requests are waiting; try again.", {"retry-after": str(after)})

    async def submit(self, request: Any) -> Any:
        """Hand a request to the batcher and wait for its answer."""
        try:
            future = self.batcher.submit(request)
        except Busy as error:
            raise self._busy(error.after) from None
        except Closed as error:
            raise Refused(503, str(error), {"retry-after": "5"}) from None
        return await self._within(asyncio.wrap_future(future))

    async def ask(self, ask: Ask) -> Found:
        return await self.submit(ask)

    async def call(self, function: Callable[[Any], T]) -> T:
        return await self.submit(Call(function))

    async def read(self, function: Callable[[], T], pool: ThreadPoolExecutor | None = None) -> T:
        """Run what reads files or the collection in a thread."""
        return await self._within(asyncio.get_running_loop().run_in_executor(pool or self.readers, function))

    async def _within(self, work: Any) -> Any:
        try:
            return await asyncio.wait_for(work, self.settings.timeout)
        except asyncio.TimeoutError:
            self.metrics.count("timeouts")
            raise Refused(503, f"this took longer than {self.settings.timeout:g} s.", {"retry-after": "5"}) from None
        except (OutOfMemory, NoEncoder) as error:
            raise Refused(503, str(error), {"retry-after": "2" if isinstance(error, OutOfMemory) else "60"}) from None
        except Exception as error:
            if lacks_memory(error):
                raise Refused(503, str(OutOfMemory()), {"retry-after": "2"}) from None
            raise

    # -- images --------------------------------------------------------------------------------------------------

    async def pixels(self, images: list[str]) -> list[Any]:
        """Preprocessed pixels of images in base64."""
        if images and self.engine.preprocess is None:
            await self.call(lambda _: None)
        return [await self.read(partial(self._prepared, data), self.decoders) for data in images]

    def _prepared(self, data: str) -> Any:
        return self.engine.preprocess(decode_pixels(image_bytes(data), key="image", limits=self.limits))

    async def picture(self, view: View, image: str | None, item: str | None) -> np.ndarray:
        """Pixels (H, W, 3) of an image that was sent, or of one of the collection, at most `SIDE` a side."""
        if (image is None) == (item is None):
            raise ClipworksError("give one of image and id.")
        return await self.read(lambda: self.seen(view, image, item), self.decoders)

    def seen(self, view: View, image: str | None, item: str | None) -> np.ndarray:
        from PIL import Image

        if image is not None:
            page = Image.fromarray(decode_pixels(image_bytes(image), key="image", limits=self.limits))
        else:
            found = picture(view, self.row(view, item or ""), 2 * SIDE)
            if found is None:
                raise BadImage(item or "", "its picture can no longer be read")
            page = found
        page.thumbnail((SIDE, SIDE), Image.Resampling.BICUBIC)
        return np.asarray(page)

    @staticmethod
    def row(view: View, item: str) -> int:
        """The row of an id, or a refusal."""
        try:
            return view.row(item)
        except KeyError:
            raise Refused(404, "the collection has no image of this id.") from None
