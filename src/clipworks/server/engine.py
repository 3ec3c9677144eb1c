"""`Engine`: the one encoder of the server and what is computed with it, a batch of requests at a time.

Everything here runs on the batcher's thread, so the encoder is never used by two requests at once. Texts, images and
rankings of a whole batch go through one pass each. After an allocation failure memory is given back and the requests
are tried one by one; one that fails alone is refused, and the next one finds the server as it was.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import logging
import re
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..errors import BadImage, ClipworksError
from ..store.search import nearest
from .shelf import Shelf, View

log = logging.getLogger("clipworks.server")
KEPT = 2048  # vectors of recent texts that are kept
MEMORY = re.compile(r"not enough memory|allocate memory|bad_alloc|out of memory|more memory than there is", re.I)


class OutOfMemory(Exception):
    """A request that needs more memory than there is."""

    def __init__(self) -> None:
        super().__init__("there is not enough memory for this request now; try a smaller one, or later.")


class NoEncoder(Exception):
    """The collection's encoder cannot be had here."""

    def __init__(self) -> None:
        super().__init__("the encoder that made this collection cannot be loaded here, so only what needs no words "
                         "and no new images works; the server's log says why.")  # fmt: skip


@dataclass
class Ask:
    """Words, images and vectors that make a query, and how many of the nearest rows are wanted.

    Attributes
    ----------
    texts : words
    pixels : preprocessed images (3, H, W)
    vectors : vectors as they are
    weights : one number per part, in this order; None leaves the parts apart
    view : the version of the collection to rank; None for the vectors alone
    k : rows wanted
    rows : only these row numbers
    """

    texts: Sequence[str] = ()
    pixels: Sequence[Any] = ()
    vectors: Sequence[np.ndarray] = ()
    weights: Sequence[float] | None = None
    view: View | None = None
    k: int = 0
    rows: np.ndarray | None = None


@dataclass
class Found:
    """Vectors of an `Ask`, and the nearest rows with their cosines if it wanted them."""

    vectors: np.ndarray
    scores: np.ndarray = field(default_factory=lambda: np.empty(0, np.float32))
    rows: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))


@dataclass
class Call:
    """Work that needs the encoder for itself: `function(encoder)`."""

    function: Callable[[Any], Any]


class Engine:
    """The encoder, loaded when it is needed and given back when nobody has asked for a while.

    Parameters
    ----------
    shelf : the collection
    load : returns the encoder (default: the one recorded in the collection)
    idle : seconds without a request after which the encoder is given back; None keeps it

    Attributes
    ----------
    state : "unloaded", "loading" or "loaded"
    preprocess : from an image to pixels, from the first load on
    """

    def __init__(self, shelf: Shelf, load: Callable[[], Any], idle: float | None = None):
        self.shelf, self.idle = shelf, idle
        self._load = load
        self._model: Any = None
        self._used = time.monotonic()
        self._busy = False  # since memory was last given back
        self._texts: OrderedDict[str, np.ndarray] = OrderedDict()
        self.cache: OrderedDict[Any, Any] = OrderedDict()  # of the calls: class words, fitted detectors
        self.state = "unloaded"
        self.preprocess: Any = None
        self.loads = self.unloads = self.failures = 0

    # -- the encoder ---------------------------------------------------------------------------------------------

    def model(self) -> Any:
        """The encoder; loads it if need be."""
        self._used = time.monotonic()
        if self._model is None:
            self.state = "loading"
            try:
                self._model = self._load()
            except (ClipworksError, OSError) as error:
                if lacks_memory(error):
                    raise
                log.error("%s", error)
                raise NoEncoder from error
            finally:
                self.state = "unloaded" if self._model is None else "loaded"
            self.preprocess = self._model.preprocess
            self.loads += 1
        return self._model

    def tidy(self) -> None:
        """Give back what is free; and the encoder, if nobody has asked for `idle` seconds."""
        if self._model is not None and self.idle is not None and time.monotonic() - self._used > self.idle:
            self.unload()
        elif self._busy:
            release()
            self._busy = False

    def unload(self) -> None:
        """Give the encoder back, with all that was computed by it."""
        self._model = None
        self._texts.clear()
        self.cache.clear()
        self.state = "unloaded"
        self.unloads += 1
        self._busy = False
        gc.collect()
        release()

    def remember(self, key: Any, make: Callable[[], Any], most: int = 32) -> Any:
        """What `make` returned for this key before, or now."""
        if key not in self.cache:
            self.cache[key] = make()
            while len(self.cache) > most:
                self.cache.popitem(last=False)
        self.cache.move_to_end(key)
        return self.cache[key]

    # -- a batch -------------------------------------------------------------------------------------------------

    def work(self, requests: list[Any]) -> list[Any]:
        """Answers to requests (`Ask` and `Call`), in their order; what went wrong with one is its answer."""
        answers: list[Any] = [None] * len(requests)
        self._busy = True
        asks = [i for i, request in enumerate(requests) if isinstance(request, Ask)]
        for i, answer in zip(asks, self._safely(self._answer, [requests[i] for i in asks]), strict=True):
            answers[i] = answer
        for i, request in enumerate(requests):
            if isinstance(request, Call):
                (answers[i],) = self._safely(lambda calls: [calls[0].function(self.model())], [request])
        self._used = time.monotonic()
        return answers

    def _safely(self, run: Callable[[list[Any]], list[Any]], batch: list[Any]) -> list[Any]:
        """Run a batch; if it fails, run its requests one by one, so that each has its own error only."""
        if not batch:
            return []
        try:
            return run(batch)
        except Exception as error:
            if lacks_memory(error):
                self.failures += 1
                del error
                self._texts.clear()
                self.cache.clear()
                gc.collect()
                if len(batch) == 1:
                    return [OutOfMemory()]
            elif len(batch) == 1:
                return [error]
        return [answer for one in batch for answer in self._safely(run, [one])]

    def _answer(self, asks: list[Ask]) -> list[Any]:
        texts = self._encoded([text for ask in asks for text in ask.texts])
        pixels = [image for ask in asks for image in ask.pixels]
        images = self._images(pixels)
        found: list[Any] = []
        for ask in asks:
            parts = [texts[t] for t in ask.texts]
            parts += [next(images) for _ in ask.pixels]
            parts += [unit(np.asarray(v, np.float32)) for v in ask.vectors]
            vectors = np.stack(parts).astype(np.float32) if parts else np.empty((0, self.shelf.dim), np.float32)
            if ask.weights is not None:
                total = unit(np.asarray(ask.weights, np.float64) @ vectors.astype(np.float64))
                vectors = total[None].astype(np.float32)
            found.append(Found(vectors))
        self._rank(asks, found)
        return found

    def _encoded(self, texts: list[str]) -> dict[str, np.ndarray]:
        """Vectors of texts; each distinct one is encoded once."""
        out = {text: self._texts[text] for text in texts if text in self._texts}
        new = [text for text in dict.fromkeys(texts) if text not in out]
        if new:
            out |= dict(zip(new, self.model().texts(new).numpy(), strict=True))
        for text in dict.fromkeys(texts):
            self._texts[text] = out[text]
            self._texts.move_to_end(text)
        while len(self._texts) > KEPT:
            self._texts.popitem(last=False)
        return out

    def _images(self, pixels: list[Any]) -> Any:
        if not pixels:
            return iter(())
        import torch

        return iter(self.model().images(torch.stack(pixels), batch_size=16).numpy())

    def _rank(self, asks: list[Ask], found: list[Found]) -> None:
        """Rank for all queries of one version that want all rows at once; those with a choice of rows one by one."""
        together: dict[int, list[int]] = {}
        for i, ask in enumerate(asks):
            if ask.view is None or not ask.k:
                continue
            if ask.rows is None:
                together.setdefault(id(ask.view), []).append(i)
            else:
                kept = ask.view.collection
                scores, rows = nearest(kept, found[i].vectors, ask.k, ask.rows)
                found[i].scores, found[i].rows = scores[0], rows[0]
        for group in together.values():
            kept = asks[group[0]].view.collection  # type: ignore[union-attr]
            most = max(asks[i].k for i in group)
            queries = np.concatenate([found[i].vectors for i in group])
            scores, rows = nearest(kept, queries, most)
            for i, row_scores, row_numbers in zip(group, scores, rows, strict=True):
                found[i].scores, found[i].rows = row_scores[: asks[i].k], row_numbers[: asks[i].k]


def unit(vector: np.ndarray) -> np.ndarray:
    """The vector at length one."""
    length = np.linalg.norm(vector)
    if not np.isfinite(length) or not length > 1e-12:
        raise ClipworksError("the query is a vector of length zero: its parts cancel.")
    return vector / length


def release() -> None:
    """Hand memory that is free to the system, where it is glibc that keeps it: by itself it keeps most of it."""
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def lacks_memory(error: BaseException) -> bool:
    """Whether an error says that memory could not be had."""
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError | BadImage | OSError) and bool(MEMORY.search(str(error)))
