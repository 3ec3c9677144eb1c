"""`build_index`: an approximate index of a collection; derived, checksummed, and as good as it was measured.

It is made beside its place and put there in one step; readers see the former one or the new one. What is there is
extended by new rows as long as it still fits the collection well, else built anew. See `indexed` for searching.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ClipworksError, CollectionError, MissingExtra, check_choice, check_range, need
from ..zeroshot.sentences import unit
from . import derived
from .collection import Collection
from .cover import write_covered
from .exact import top_k
from .identity import encoder_of
from .indexed import FORMAT, KINDS, OPEN, Index, kind_of, newest
from .table import INDEXES, translated

LEAST = 1_000  # rows below which no index is built
MEMORY = 2 << 30
QUERIES, K = 200, 10  # rows that are not trained on, beside which recall at K is measured


@dataclass
class IndexReport:
    """What `build_index` did.

    Attributes
    ----------
    path, kind : the collection and the kind of index
    rows : rows that the index covers
    done : "built", "extended" or "up to date"
    recall : share of the exact ten best that it finds, for queries as near to rows that it was not trained on as
        those rows are to each other
    recall_words : the same for words; None where the encoder of the collection cannot be loaded
    ms, exact_ms : milliseconds per query, one at a time, with the index and exactly
    breadth, candidates : how hard it looks (see `ann.Effort`)
    size : bytes on disk
    seconds : of wall time
    reached : whether the recall that was asked for was reached
    """

    path: str
    kind: str
    rows: int = 0
    done: str = "built"
    recall: float = 0.0
    recall_words: float | None = None
    ms: float = 0.0
    exact_ms: float = 0.0
    breadth: int = 0
    candidates: int = 0
    size: int = 0
    seconds: float = 0.0
    reached: bool = True

    def __str__(self) -> str:
        words = "" if self.recall_words is None else f" ({self.recall_words:.3f} for words)"
        return (
            f"{self.path}: {self.kind} index of {self.rows:,} rows {self.done}, {self.size / 1e6:,.1f} MB, "
            f"{self.seconds:.1f} s; recall@{K} {self.recall:.3f}{words} at {self.ms:.2f} ms per query, "
            f"exact {self.exact_ms:.2f} ms"
        )


def build_index(
    collection: str | os.PathLike | Collection,
    *,
    kind: str = "ivf",
    recall: float = 0.98,
    memory: int = MEMORY,
    rebuild: bool = False,
    seed: int = 0,
) -> IndexReport:
    """Build an approximate index of a collection, or bring the one that is there up to date.

    The exact search needs none; an index pays from some millions of rows on, or for many queries to a process that
    keeps the collection open. It looks as hard as it must for the recall that is asked for, which is measured against
    the exact search: for vectors that are in no row (see `unseen`), and for words (captions of the collection where it
    has some, common things and places where not), which are harder, since they lie farther away.

    Parameters
    ----------
    collection : a collection or its folder
    kind : "ivf" (cells, a byte per number), "hnsw" (a graph: quick to ask, slow to build), "pq" (the smallest) or
        "lance" (LanceDB's own, read from the disk); all but the last need faiss
    recall : share of the ten best that it is to find
    memory : bytes that building may take, beyond the program itself and pages of the collection
    rebuild : build it from the start, even if the one that is there could be extended
    seed : of the clustering and the rows that are held out

    Returns
    -------
    IndexReport

    Raises
    ------
    ClipworksError
        If the collection is too small, or the memory for this kind.
    MissingExtra
        If faiss is needed and not installed.
    CollectionError
        If the index cannot be written.
    """
    opened, started = Collection.open(collection), time.perf_counter()
    check_choice("kind", kind, KINDS)
    check_range("recall", recall, 0.0, 1.0)
    if len(opened) < LEAST:
        raise ClipworksError(
            f"an index needs at least {LEAST:,} rows, {str(opened.path)!r} has {len(opened):,}: "
            "the exact search takes less than a millisecond there."
        )
    if kind != "lance":
        need("faiss", "search")
    room = _room(opened, kind, memory)
    former = None if rebuild else _former(opened, kind)
    if former is not None and _fits(former, opened, recall):
        return _report(opened, former.facts, "up to date", started, recall)
    former = former if former is not None and former.kind.extensible else None
    target = opened.path / INDEXES / f"{kind}-{_number(newest(opened.path, kind)) + 1:06d}-{secrets.token_hex(4)}"
    made: dict[str, Any] = {}

    def write(folder: Path) -> bool:
        made.update(_write(opened, folder, kind, recall, room, seed, former))
        return True

    with translated(opened.path, kind_of(kind).size(len(opened), opened.dim)):
        target.parent.mkdir(exist_ok=True)
        derived.make(target.parent, target, write)
        derived.clear(_older(target))
    OPEN.pop(opened, None)
    return _report(opened, made, "extended" if former else "built", started, recall)


def _former(opened: Collection, kind: str) -> Index | None:
    """The index that is there, if it can be used."""
    folder = newest(opened.path, kind)
    if folder is None:
        return None
    try:
        return Index(folder, opened)
    except (CollectionError, MissingExtra):
        return None


def _fits(former: Index, opened: Collection, recall: float) -> bool:
    same = former.facts["version"] == opened.version or not former.cover.strange
    return same and former.facts["asked"] == recall


def _number(folder: Path | None) -> int:
    return int(folder.name.split("-")[1]) if folder else 0


def _older(target: Path) -> Iterator[Path]:
    """Indexes of the same kind that came before, and what makers that were killed left."""
    kind = target.name.split("-")[0]
    for folder in list(target.parent.iterdir()):
        former = folder.name.startswith(f"{kind}-") and folder.name < target.name
        if former or folder.name.startswith(derived.MAKING):
            yield folder


def _room(opened: Collection, kind: str, memory: int) -> int:
    """Bytes for the training rows and for blocks, beside the index itself."""
    sizes = {name: kind_of(name).size(len(opened), opened.dim) + _least_room(opened.dim) for name in KINDS}
    if memory < sizes[kind]:
        others = ", ".join(f"{name} {size:,}" for name, size in sizes.items() if name != kind)
        raise ClipworksError(
            f"memory must be at least {sizes[kind]:,} bytes for the kind {kind!r} here ({others}). Got {memory:,}."
        )
    return memory - sizes[kind] + _least_room(opened.dim)


def _least_room(dim: int) -> int:
    return 3 * 4 * dim * 4096


def _write(
    opened: Collection, folder: Path, kind: str, recall: float, room: int, seed: int, former: Index | None
) -> dict[str, Any]:
    """Build or extend the index in a folder, measure it, seal it."""
    from .ann import POINTS, Plan, cells

    draw = np.random.default_rng(seed)
    held = np.sort(draw.choice(len(opened), min(QUERIES, len(opened) // 10), replace=False))
    block = int(min(16384, max(256, room // (16 * opened.dim))))
    if former is None:
        row_of = np.arange(len(opened))
        count = min(POINTS * max(cells(len(opened)), 160), room // (3 * 4 * opened.dim))
        others = np.setdiff1d(row_of, held)
        chosen = np.sort(draw.choice(others, min(count, len(others)), replace=False))
        sample = np.concatenate([part for part in blocks(opened.vectors, chosen, block)])
        plan = Plan(len(opened), opened.dim, sample, lambda: blocks(opened.vectors, None, block), seed)
        built = kind_of(kind).build(folder, plan)
        del sample, plan
    else:
        row_of, built = np.concatenate([former.cover.row_of, former.cover.fresh]), former.kind
        built.extend(folder, blocks(opened.vectors, former.cover.fresh, block))
    write_covered(folder, opened, row_of)
    measured = _measure(opened, built, row_of, unseen(opened, held, seed), recall)
    facts = {"format": FORMAT, "kind": kind, "version": opened.version, "dim": opened.dim, "rows": len(opened),
             "seed": seed, "asked": recall, **measured}  # fmt: skip
    names = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
    derived.seal(folder, [name for name in names if name != derived.MAKER], **facts)
    return derived.read_facts(folder)


def blocks(vectors: np.ndarray, rows: np.ndarray | None, height: int) -> Iterator[np.ndarray]:
    """All rows, or the chosen ones, in float32, a block at a time."""
    for start in range(0, len(vectors) if rows is None else len(rows), height):
        chosen = slice(start, start + height) if rows is None else rows[start : start + height]
        yield np.ascontiguousarray(vectors[chosen], np.float32)


def unseen(opened: Collection, rows: np.ndarray, seed: int = 0) -> np.ndarray:
    """Queries as from images that are in no row: `rows` turned at random, each until it is as near as its nearest.

    The rows themselves would be too easy: where they lie the index was made for them.

    Returns
    -------
    (len(rows), dim) float32 of unit length
    """
    vectors = unit(np.asarray(opened.vectors[rows], np.float32))
    scores, near = top_k(opened.vectors, vectors, 2, norm=opened.norm)
    cosine = np.clip(np.where(near[:, 0] == rows, scores[:, -1], scores[:, 0]), 0, 1)[:, None]
    aside = np.random.default_rng(seed).standard_normal(vectors.shape, dtype=np.float32)
    aside = unit(aside - (aside * vectors).sum(1, keepdims=True) * vectors)
    return cosine * vectors + np.sqrt(1 - cosine**2) * aside


@dataclass
class _Trial:
    """Queries with the score that a row needs to be among the exact ten best."""

    queries: np.ndarray
    least: np.ndarray

    @classmethod
    def of(cls, opened: Collection, queries: np.ndarray) -> _Trial:
        queries = unit(np.asarray(queries, np.float32))
        return cls(queries, top_k(opened.vectors, queries, K, norm=opened.norm)[0][:, -1])

    def recall(self, opened: Collection, kind: Any, row_of: np.ndarray, effort: Any) -> float:
        """Share of the exact ten best that are found at an effort."""
        allowed, hits = row_of >= 0 if (row_of < 0).any() else None, 0
        for query, least in zip(self.queries, self.least, strict=True):
            near = kind.search(query[None], K * effort.candidates, effort.breadth, allowed)[0]
            near = row_of[near[near >= 0]]
            exact = (np.asarray(opened.vectors[near], np.float32) * query).sum(1)
            hits += min(K, int((exact >= least - 1e-6).sum()))
        return hits / (K * len(self.queries))


def _measure(opened: Collection, kind: Any, row_of: np.ndarray, images: np.ndarray, recall: float) -> dict[str, Any]:
    """The least effort that reaches a recall, or else the one with the best, with what it costs."""
    words = _words(opened)
    trials = [_Trial.of(opened, queries) for queries in (images, words) if queries is not None]
    best: dict[str, Any] = {}
    for effort in kind.efforts():
        started = time.perf_counter()
        found = [trial.recall(opened, kind, row_of, effort) for trial in trials]
        ms = (time.perf_counter() - started) * 1e3 / sum(len(trial.queries) for trial in trials)
        if not best or min(found) > min(best["found"]):
            best = {"found": found, "ms": ms, "breadth": effort.breadth, "candidates": effort.candidates}
        if min(found) >= recall:
            break
    found, *of_words = best.pop("found")
    started = time.perf_counter()
    for query in trials[0].queries[:10]:
        top_k(opened.vectors, query[None], K, norm=opened.norm)
    exact_ms = (time.perf_counter() - started) * 1e3 / len(trials[0].queries[:10])
    return {**best, "recall": found, "recall_words": of_words[0] if of_words else None, "exact_ms": exact_ms}


def _words(opened: Collection) -> np.ndarray | None:
    """Vectors of words to ask for; None where the encoder of the collection cannot be loaded."""
    from ..retrieval.vocabulary import visual_vocabulary

    captions = list(dict.fromkeys(text for text in opened.column("caption") if text))
    texts = captions[:: max(1, len(captions) // QUERIES)][:QUERIES] if len(captions) >= QUERIES else visual_vocabulary()
    try:
        return encoder_of(opened).texts(texts).numpy()
    except (ClipworksError, OSError):
        return None


def _report(opened: Collection, facts: dict[str, Any], done: str, started: float, recall: float) -> IndexReport:
    given = {
        name: facts[name]
        for name in ("kind", "rows", "recall", "recall_words", "ms", "exact_ms", "breadth", "candidates")
    }
    size = sum(size for size, _ in facts["files"].values())
    seconds = time.perf_counter() - started
    reached = min(facts["recall"], 1.0 if facts["recall_words"] is None else facts["recall_words"]) >= recall
    return IndexReport(str(opened.path), **given, done=done, size=size, seconds=seconds, reached=reached)
