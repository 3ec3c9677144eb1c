"""Exact nearest rows by inner product, straight from a memory-mapped matrix, in blocks, under a memory ceiling.

Few queries read float16 as it lies (half the bytes of float32); many queries go through bf16 products where the
processor has them. Both give scores with a known bound on their error: |s' - s| <= e. The best of them are computed
again in float32, and if the k-th exact score t is not above the best score left out by more than e, the query is
done once more in float32 throughout. The answer is therefore exact, whatever the path.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from ..encoders.precision import fast_matmul
from ..errors import ClipworksError, check_choice, check_range
from .table import MEMORY

FEW, MANY = 3, 16  # up to FEW queries go one by one; from MANY on bf16 pays for its conversion
BLOCK = 2048  # rows converted and multiplied at once; larger blocks leave the cache


def top_k(
    vectors: np.ndarray,
    queries: np.ndarray,
    k: int,
    *,
    rows: np.ndarray | None = None,
    memory: int = MEMORY,
    norm: float | None = None,
    path: str = "auto",
) -> tuple[np.ndarray, np.ndarray]:
    """The k rows with the largest inner product with each query.

    Parameters
    ----------
    vectors : (n, dim) float16 or float32, memory-mapped or not
    queries : (q, dim) float32
    k : hits per query; fewer rows give fewer hits
    rows : only these row numbers (ascending)
    memory : bytes for blocks and scores (default 256 MiB); less costs time, never exactness
    norm : length of the longest row, where it is known
    path : "auto", or one of "float32", "half", "bf16" for tests and benchmarks

    Returns
    -------
    scores : (q, min(k, n)) float32, descending; equal scores in the order of their rows
    rows : (q, min(k, n)) int64
    """
    check_range("k", k, 1)
    check_range("memory", memory, 1 << 20)
    check_choice("path", path, ("auto", "float32", "half", "bf16"))
    if path == "half" and vectors.dtype != np.float16:
        raise ClipworksError("path 'half' reads float16 vectors only.")
    queries = np.ascontiguousarray(queries, dtype=np.float32)
    if queries.ndim != 2 or queries.shape[1] != vectors.shape[1]:
        raise ClipworksError(f"queries must have the shape (q, {vectors.shape[1]}). Got {queries.shape}.")
    if not np.isfinite(queries).all():
        raise ClipworksError("queries must be finite numbers. Got NaN or infinity.")
    count = len(vectors) if rows is None else len(rows)
    k = min(k, count)
    if not k or not len(queries):
        return np.empty((len(queries), k), np.float32), np.empty((len(queries), k), np.int64)
    at_once = max(1, min(len(queries), memory // (32 * max(BLOCK, 4 * k + 256))))
    task = _Task(vectors, rows, memory, norm)
    parts = [task.some(queries[i : i + at_once], k, path) for i in range(0, len(queries), at_once)]
    return np.concatenate([s for s, _ in parts]), np.concatenate([r for _, r in parts])


def choose(queries: int, dtype: np.dtype) -> str:
    """The fastest path for a number of queries."""
    if queries <= FEW and dtype == np.float16 and torch.cpu._is_avx512_supported():
        return "half"
    if queries >= MANY and torch.cpu._is_avx512_bf16_supported():
        return "bf16"
    return "float32"


@dataclass
class _Task:
    """The rows to search, and what they may cost."""

    vectors: np.ndarray
    rows: np.ndarray | None
    memory: int
    norm: float | None

    @property
    def count(self) -> int:
        return len(self.vectors) if self.rows is None else len(self.rows)

    def some(self, queries: np.ndarray, k: int, path: str) -> tuple[np.ndarray, np.ndarray]:
        """As many queries as the memory allows at once."""
        path = choose(len(queries), self.vectors.dtype) if path == "auto" else path
        keep = min(self.count, 2 * k + 48)
        asked = torch.from_numpy(queries)
        short = asked.half() if path == "half" else asked.bfloat16()
        if path == "float32" or keep == self.count or not torch.isfinite(short).all():
            return self.exact(queries, k)
        best = _Best(len(queries), keep, self.count, self.memory)
        if path == "half":
            for block in self.stored(4 * BLOCK):
                best.update(torch.stack([torch.mv(block, q) for q in short]))
        else:
            narrow = torch.empty(BLOCK, self.vectors.shape[1], dtype=torch.bfloat16)
            for block in self.wide():
                best.update(F.linear(short, narrow[: len(block)].copy_(block)))
        approximate, numbers = self.numbers(best)
        scores, numbers = self.rescore(queries, numbers)
        unit = 2.0**-11 if path == "half" else 2.0**-9  # of the short type; float16 rows are not rounded themselves
        size = torch.linalg.vector_norm(asked, dim=1) * (1e-5 if path == "half" else unit + 1e-5)
        bound = self.longest() * (torch.linalg.vector_norm(asked - short.float(), dim=1) + size)
        # a row left out scored at most approximate[-1], which was rounded to the short type once more
        left_out = approximate[:, -1] + unit * approximate[:, -1].abs() + bound + 2.0**-24
        doubtful = np.flatnonzero(~(left_out.numpy() < scores[:, k - 1]))
        scores, numbers = scores[:, :k], numbers[:, :k]
        if len(doubtful):
            scores[doubtful], numbers[doubtful] = self.exact(queries[doubtful], k)
        return scores, numbers

    def exact(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Float32 throughout; more than k are kept until no equal score can have been left out."""
        keep = min(self.count, k + 16)
        while True:
            best = _Best(len(queries), keep, self.count, self.memory)
            with fast_matmul():
                for block in self.wide():
                    if len(queries) == 1:  # numpy's product of a matrix and a vector is the faster one
                        best.update(torch.from_numpy(block.numpy() @ queries[0])[None])
                    else:
                        best.update(F.linear(torch.from_numpy(queries), block))
            approximate, numbers = self.numbers(best)
            scores, numbers = self.rescore(queries, numbers)
            slack = 1e-5 * self.longest() * np.linalg.norm(queries.astype(np.float64), axis=1)
            if keep == self.count or (approximate[:, -1].numpy() + slack < scores[:, k - 1]).all():
                return scores[:, :k], numbers[:, :k]
            keep = min(self.count, 8 * keep)

    def stored(self, height: int) -> Iterator[torch.Tensor]:
        """Consecutive rows (or the chosen ones) as they are stored."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*not writable.*")
            for start in range(0, self.count, height):
                chosen = slice(start, start + height) if self.rows is None else self.rows[start : start + height]
                yield torch.from_numpy(np.asarray(self.vectors[chosen]))

    def wide(self) -> Iterator[torch.Tensor]:
        """The same in float32, always in the same memory."""
        buffer = torch.empty(BLOCK, self.vectors.shape[1])
        for block in self.stored(BLOCK):
            yield buffer[: len(block)].copy_(block)

    def numbers(self, best: _Best) -> tuple[torch.Tensor, np.ndarray]:
        """Scores, best first, and the row numbers they belong to."""
        best.sift()
        scores, order = best.scores.sort(descending=True, stable=True)
        places = best.places.gather(1, order).numpy()
        return scores, places if self.rows is None else self.rows[places]

    def rescore(self, queries: np.ndarray, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Scores in float32 and the row numbers, best first, equal scores by row number."""
        scores = np.empty(numbers.shape, np.float32)
        for i, (query, row) in enumerate(zip(queries, numbers, strict=True)):
            # summed row by row: unlike a matrix product a score does not depend on the rows beside it
            scores[i] = (np.asarray(self.vectors[row], np.float32) * query).sum(1)
        order = np.lexsort((numbers, -scores), axis=1)
        return np.take_along_axis(scores, order, 1), np.take_along_axis(numbers, order, 1)

    def longest(self) -> float:
        """Length of the longest row."""
        if self.norm is None:
            whole = _Task(self.vectors, None, self.memory, None)
            self.norm = float(max(torch.linalg.vector_norm(block, dim=1).max() for block in whole.wide()))
        return self.norm


class _Best:
    """The best scores of every query so far, and their places; blocks are gathered before they are sifted."""

    def __init__(self, queries: int, keep: int, count: int, memory: int):
        self.keep = keep
        self.scores = torch.empty(queries, 0)
        self.places = torch.empty(queries, 0, dtype=torch.int64)
        self.width = max(4 * BLOCK, min(count, memory // (8 * queries)))
        self.buffer: torch.Tensor | None = None
        self.start = self.filled = 0

    def update(self, scores: torch.Tensor) -> None:
        """Take the scores of the rows that follow."""
        if self.buffer is None:
            self.buffer = torch.empty(len(scores), self.width, dtype=scores.dtype)
        if self.filled + scores.shape[1] > self.width:
            self.sift()
        self.buffer[:, self.filled : self.filled + scores.shape[1]] = scores
        self.filled += scores.shape[1]

    def sift(self) -> None:
        if self.buffer is None or not self.filled:
            return
        top, places = self.buffer[:, : self.filled].topk(min(self.keep, self.filled), sorted=False)
        joined = torch.cat([self.scores, top.float()], 1)
        where = torch.cat([self.places, places + self.start], 1)
        if joined.shape[1] > self.keep:
            joined, chosen = joined.topk(self.keep, sorted=False)
            where = where.gather(1, chosen)
        self.scores, self.places = joined, where
        self.start += self.filled
        self.filled = 0
