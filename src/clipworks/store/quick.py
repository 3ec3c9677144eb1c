"""The first query of a process without torch, which takes longer to import than a small search takes.

Words are encoded by `encoders.quick_text`, if the collection knows the very file of its encoder, and rows are compared
in numpy. Once torch is there, or for more than a few queries or a large collection, `exact` and `Encoder` do the work.
The answers are the same: scores are computed by the same sum, and in doubt `exact` is asked.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import numpy as np

from .identity import weights_file
from .journal import sha256

if TYPE_CHECKING:
    from .collection import Collection

SMALL = 1 << 28  # numbers times queries beyond which torch is worth its import
BLOCK = 2048  # rows converted and multiplied at once; larger blocks leave the cache


def text_vectors(collection: Collection, texts: Sequence[str]) -> np.ndarray | None:
    """Unit vectors of words by the recorded encoder; None where that takes the encoder itself."""
    recorded = collection.meta["encoder"]
    path = weights_file(recorded.get("source"))
    known = recorded.get("weights")
    if "torch" in sys.modules or path is None or not known or recorded.get("precision") != "fp32":
        return None
    from ..encoders.quick_text import QuickText

    try:
        with _one_thread():
            return QuickText(path)(texts) if sha256(path) == known else None
    except (ValueError, OSError):
        return None  # the encoder says what is wrong


def top_k(
    vectors: np.ndarray,
    queries: np.ndarray,
    k: int,
    *,
    rows: np.ndarray | None = None,
    memory: int,
    norm: float,
) -> tuple[np.ndarray, np.ndarray]:
    """As `exact.top_k`."""
    count = len(vectors) if rows is None else len(rows)
    sound = queries.dtype == np.float32 and np.isfinite(queries).all() and k > 0
    if "torch" not in sys.modules and sound and count * vectors.shape[1] * len(queries) <= SMALL:
        with _one_thread():
            found = [_nearest(vectors, query, k, rows, count, norm) for query in queries]
        if found and all(one is not None for one in found):
            return np.stack([one[0] for one in found if one]), np.stack([one[1] for one in found if one])
    from .exact import top_k as exactly

    return exactly(vectors, queries, k, rows=rows, memory=memory, norm=norm)


def _one_thread() -> AbstractContextManager:
    """Products of these sizes gain nothing from threads, which wait for each other in busy loops."""
    from threadpoolctl import threadpool_limits  # comes with scikit-learn

    return threadpool_limits(1, "blas")


def _nearest(
    vectors: np.ndarray, query: np.ndarray, k: int, rows: np.ndarray | None, count: int, norm: float
) -> tuple[np.ndarray, np.ndarray] | None:
    """Scores and rows of the best, or None if a row that was left out could be among them."""
    approximate = np.empty(count, np.float32)
    for start, block in _wide(vectors, rows, count):
        approximate[start : start + len(block)] = block @ query
    keep, k = min(count, k + 32), min(count, k)
    places = np.argpartition(-approximate, keep - 1)[:keep] if keep < count else np.arange(count)
    numbers = places if rows is None else rows[places]
    scores = (np.asarray(vectors[numbers], np.float32) * query).sum(1)  # as `exact.top_k` does
    order = np.lexsort((numbers, -scores))[:k]
    slack = 1e-5 * norm * float(np.linalg.norm(query.astype(np.float64)))
    if keep < count and not approximate[places].min() + slack < scores[order[-1]]:
        return None
    return scores[order], numbers[order].astype(np.int64)


def _wide(vectors: np.ndarray, rows: np.ndarray | None, count: int) -> Iterator[tuple[int, np.ndarray]]:
    """Rows in float32, a block at a time."""
    bits = np.empty((BLOCK, vectors.shape[1]), np.uint32)
    for start in range(0, count, BLOCK):
        chosen = slice(start, start + BLOCK) if rows is None else rows[start : start + BLOCK]
        block = np.ascontiguousarray(vectors[chosen])
        yield start, block if block.dtype == np.float32 else _from_half(block, bits[: len(block)])


def _from_half(block: np.ndarray, bits: np.ndarray) -> np.ndarray:
    """Finite float16 to float32, exactly, by moving bits: several times as fast as numpy's own conversion.

    The exponent of a float16 counts from -15 and that of a float32 from -127, which a factor of 2^112 makes up for; it
    also brings subnormal numbers to their value.
    """
    whole = block.view(np.int16).astype(np.int32)  # the sign fills the upper half
    np.left_shift(whole.view(np.uint32), 13, out=bits)
    np.bitwise_and(bits, np.uint32(0x8FFFE000), out=bits)
    wide = bits.view(np.float32)
    wide *= np.float32(2.0**112)
    return wide
